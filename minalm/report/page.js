"use strict";
const runs = JSON.parse(document.getElementById("data").textContent).runs;
const shown = runs.map(() => true);
const colour = (n) => `var(--r${n % 8})`;
const LOSSES = { sft: "next token (sft)", alm: "likelihood matching (alm)", next_byte: "next byte", latents: "hidden states (latents)" };

/* An element: its tag and classes, attributes or properties, children. Text is never read as HTML. */
function el(tag, values = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(values)) {
    if (key.startsWith("on")) made[key] = value;
    else if (key === "own") made.style.setProperty("--own", value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svg(tag, values = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(digits);
}

function duration(hours) {
  if (hours < 1 / 40) return `${(hours * 3600).toFixed(0)} s`;
  if (hours < 2) return `${(hours * 60).toFixed(0)} min`;
  return hours < 100 ? `${hours.toFixed(1)} h` : `${(hours / 24).toFixed(1)} d`;
}

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}

/* --- the axis --------------------------------------------------------------------------------------------------- */

const AXES = {
  step: { of: (run) => run.metrics.step, at: (row) => row.step, say: (x) => `step ${Math.round(x).toLocaleString("en")}`, tick: (x) => x.toLocaleString("en") },
  hours: { of: (run) => run.metrics.seconds.map((s) => s / 3600), at: (row) => row.seconds / 3600, say: duration, tick: duration },
  text: { of: (run) => run.metrics.bytes, at: (row, run) => nearest(run.metrics.step, row.step, run.metrics.bytes), say: bytes, tick: bytes },
};
let axis = "step";

function nearest(xs, x, ys) {
  if (!xs || !xs.length || !ys) return NaN;
  if (x < xs[0] / 2) return 0;
  let best = 0;
  xs.forEach((value, n) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = n; });
  return ys[best];
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

/* A running mean of the values so far, in which a value's share falls by half after 1/40 of the curve. */
function smoothed(values) {
  const keep = 0.5 ** (40 / Math.max(values.length, 40));
  let mean = 0, share = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    mean = keep * mean + (1 - keep) * value;
    share = keep * share + (1 - keep);
    return mean / share;
  });
}

/* --- charts ----------------------------------------------------------------------------------------------------- */

const charts = [];

/* lines: run -> values beside its metrics, or null; points: run -> [[evaluation, value], ...]. */
function chart(title, lines, points = () => [], options = {}) {
  if (!runs.some((run) => (lines(run) || []).length || points(run).length > 2)) return; // two points are in the table
  const box = el("div.card.chart" + (options.wide ? ".wide" : ""), {}, el("h3", {}, title));
  const area = el("div"), read = el("div.read");
  box.append(area, read);
  document.getElementById("charts").append(box);
  charts.push({ title, lines, points, options, area, read });
}

function draw(plot) {
  const { area, read, options } = plot;
  const width = Math.max(area.clientWidth, 200), height = options.wide ? 260 : 190;
  const left = 46, right = 10, top = 8, bottom = 22;
  const smooth = document.getElementById("smooth").checked && !options.exact;
  const curves = [], dots = [];
  runs.forEach((run, n) => {
    if (!shown[n]) return;
    const ys = plot.lines(run), xs = AXES[axis].of(run);
    if (ys && xs) curves.push({ n, xs, ys, soft: smooth ? smoothed(ys) : ys });
    // Beside a curve, what was before the first step would only squeeze it; the table has it.
    const found = plot.points(run).filter(([row]) => (row.step > 0 || !ys) && Number.isFinite(AXES[axis].at(row, run)));
    if (found.length) dots.push({ n, xs: found.map(([row]) => AXES[axis].at(row, run)), ys: found.map(([, value]) => value) });
  });
  read.replaceChildren();
  const all = [...curves, ...dots];
  const xs = all.flatMap((c) => c.xs).filter(Number.isFinite);
  // The first values of a run are far above all others: the axis is that of what follows, unless there is little else.
  const ys = [
    ...curves.flatMap((c) => c.soft.slice(c.soft.length > 40 && !options.exact ? Math.floor(c.soft.length / 50) : 0)),
    ...dots.flatMap((c) => c.ys),
  ].filter(Number.isFinite);
  if (!xs.length || !ys.length) return area.replaceChildren(el("p.soft", {}, "Nothing is shown."));
  let [x0, x1, y0, y1] = [0, Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (options.zero) y0 = Math.min(0, y0);
  if (y1 - y0 < 1e-12) { y0 -= Math.abs(y0) * 0.1 + 1e-9; y1 += Math.abs(y1) * 0.1 + 1e-9; }
  const room = (y1 - y0) * 0.05;
  if (!(options.zero && y0 === 0)) y0 -= room;
  y1 += room;
  x1 = x1 || 1;
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const Y = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": plot.title });
  const format = options.format || number;
  for (const y of ticks(y0, y1, 4)) {
    made.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }));
    const digits = Math.max(0, Math.min(4, 1 - Math.floor(Math.log10((y1 - y0) / 4))));
    made.append(svg("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, options.format ? format(y) : number(y, digits)));
  }
  for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 110)))) {
    const place = X(x) > width - 34 ? "end" : X(x) < left + 20 ? "start" : "middle";
    made.append(svg("text", { x: X(x), y: height - 6, "text-anchor": place }, AXES[axis].tick(x)));
  }
  const clip = `c${charts.indexOf(plot)}`;
  const hidden = svg("clipPath", { id: clip });
  hidden.append(svg("rect", { x: left, y: top - 4, width: width - left - right, height: height - top - bottom + 8 }));
  made.append(hidden);
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  const path = (c, ys) => c.xs.map((x, n) => [x, ys[n]]).filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y))
    .map(([x, y], n) => `${n ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
  for (const c of curves) {
    if (smooth && c.ys.length > 40) inside.append(svg("path", { d: path(c, c.ys), fill: "none", stroke: colour(c.n), "stroke-opacity": 0.22 }));
    inside.append(svg("path", { d: path(c, c.soft), fill: "none", stroke: colour(c.n), "stroke-width": 1.8, "stroke-linejoin": "round" }));
  }
  for (const c of dots) {
    if (c.xs.length > 1) inside.append(svg("path", { d: path(c, c.ys), fill: "none", stroke: colour(c.n), "stroke-width": 1.2, "stroke-dasharray": curves.length ? "3 3" : "none" }));
    c.xs.forEach((x, n) => inside.append(svg("circle", { cx: X(x), cy: Y(c.ys[n]), r: 4, fill: colour(c.n), stroke: "var(--card)", "stroke-width": 1.5 })));
  }
  const cross = svg("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  made.append(inside, cross);
  const say = (event) => {
    const at = x0 + ((event.clientX - made.getBoundingClientRect().left - left) / (width - left - right)) * (x1 - x0);
    if (at < x0 || at > x1) return;
    cross.setAttribute("x1", X(at)); cross.setAttribute("x2", X(at)); cross.setAttribute("visibility", "visible");
    const values = curves.filter((c) => at <= c.xs[c.xs.length - 1] * 1.001).map((c) => [c.n, nearest(c.xs, Math.max(at, c.xs[0]), c.soft)]);
    if (!curves.length) values.push(...dots.map((c) => [c.n, nearest(c.xs, at, c.ys)]));
    read.replaceChildren(el("span", {}, AXES[axis].say(at)), ...values.map(([n, y]) => el("span", {}, el("span.dot", { own: colour(n) }), format(y))));
  };
  made.onpointermove = say;
  made.onpointerdown = say;
  made.onpointerleave = () => { cross.setAttribute("visibility", "hidden"); read.replaceChildren(); };
  area.replaceChildren(made);
}

function speed(run) {
  const { seconds, bytes: read, step } = run.metrics;
  if (!read || read.length < 3) return null;
  return read.map((count, n) => {
    const from = Math.max(0, n - 1), time = seconds[n] - seconds[from];
    return time > 0 && step[n] > step[from] ? (count - read[from]) / time : null;
  });
}

function makeCharts() {
  const evaluated = (pick) => (run) => run.evaluations.map((row) => [row, pick(row)]).filter(([, value]) => value !== null && value !== undefined);
  const metric = (name) => (run) => run.metrics[name];
  chart("bits per byte: training text (lines), held-out text (dots)", metric("bits_per_byte"), evaluated((row) => row.bits_per_byte.student), { wide: true });
  const names = new Set(runs.flatMap((run) => Object.keys(run.metrics)));
  const losses = [...names].filter((name) => name.startsWith("loss/")).map((name) => name.slice(5)).sort();
  for (const loss of losses) chart(LOSSES[loss] || loss, metric(`loss/${loss}`));
  chart("held out: nats a chunk from the teacher", () => null, evaluated((row) => row.agreement));
  chart("held out: greedy bytes as the teacher's", () => null, evaluated((row) => row.greedy));
  chart("held out: calibration error of boundaries", () => null, evaluated((row) => row.calibration));
  if (losses.length > 1) for (const loss of losses) chart(`weight of ${LOSSES[loss] || loss}`, metric(`weight/${loss}`), undefined, { zero: true });
  chart("norm of the gradient", metric("gradient_norm"), undefined, { zero: true });
  chart("learning rate", metric("learning_rate"), undefined, { zero: true, exact: true, format: (v) => (v === 0 ? "0" : v.toExponential(1)) });
  chart("text a second", speed, undefined, { zero: true, format: (v) => `${bytes(v)}` });
}

const redraw = () => charts.forEach(draw);

/* --- tables ----------------------------------------------------------------------------------------------------- */

const dot = (n) => el("span.dot", { own: colour(n) });

function table(titles, rows, kind = "table") {
  return el("div.scroll", {}, el(kind, {}, el("thead", {}, el("tr", {}, ...titles.map((t) => el("th", {}, t)))), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, cell)))))));
}

function showSummary() {
  const rows = runs.map((run, n) => {
    const first = run.evaluations[0], last = run.evaluations[run.evaluations.length - 1];
    const { step = [], seconds = [], bytes: read = [] } = run.metrics;
    const end = step.length - 1, hours = end >= 0 ? seconds[end] / 3600 : 0;
    const done = end >= 0 ? step[end] : 0;
    const of = (row, pick) => (row ? number(pick(row)) : "");
    return [
      el("span", {}, dot(n), run.name),
      done === run.settings.steps ? done.toLocaleString("en") : `${done.toLocaleString("en")} of ${run.settings.steps.toLocaleString("en")}`,
      duration(hours), read.length ? bytes(read[end]) : "", read.length && hours ? `${bytes(read[end] / hours / 3600)}/s` : "",
      of(first, (row) => row.bits_per_byte.teacher), of(first, (row) => row.bits_per_byte.student), last === first ? "" : of(last, (row) => row.bits_per_byte.student),
      ...["agreement", "greedy", "calibration"].map((name) => (last === first ? "" : of(last, (row) => row[name]))),
    ];
  });
  const titles = ["run", "steps", "time", "text", "speed", "bits per byte: teacher", "before", "after", "nats a chunk", "greedy bytes", "calibration"];
  const notes = runs.flatMap((run, n) => run.notes.map((note) => el("p.soft", {}, dot(n), `${run.name}: ${note}`)));
  document.getElementById("summary").append(el("h2", {}, "Results"), table(titles, rows), ...notes);
}

function showSettings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const text = (value) => (value === undefined ? "" : Array.isArray(value) ? value.join(" ") : typeof value === "object" && value !== null ? JSON.stringify(value) : String(value));
  const values = names.map((name) => [name, ...runs.map((run) => text(run.settings[name]))]);
  const differ = values.filter(([, first, ...others]) => others.some((other) => other !== first));
  const place = document.getElementById("settings"), titles = ["", ...runs.map((run) => run.name)];
  place.append(el("h2", {}, "Settings"));
  if (runs.length > 1) place.append(el("p.soft", {}, differ.length ? "Those that differ:" : "All runs have the same."), table(titles, differ, "table.words"));
  place.append(el("details", {}, el("summary", {}, "all settings"), table(titles, values, "table.words")));
}

/* --- texts ------------------------------------------------------------------------------------------------------ */

function showTexts() {
  if (!runs.some((run) => run.texts && run.texts.length)) return;
  const place = document.getElementById("texts");
  place.append(
    el("h2", {}, "One text, two tokenizations"),
    el("p", {}, "Teacher above, student below. Each column is a chunk: the shortest stretch of bytes at whose end a token ends on both sides. ",
      "Chunks of one colour are one group, which the losses compare as a whole. Choose a chunk to see its numbers."),
    el("div.key", {},
      el("span", {}, "numbers: log p of the chunk on each side, in nats; the student's are ", el("span.gap.far", {}, "red"), " where the two are 1 or more apart"),
      el("span", {}, "bars: the teacher's boundary mass behind the chunk, full at 1; blue where it ended the group")));
  const texts = [...new Set(runs.flatMap((run) => (run.texts || []).map((one) => one.text)))];
  texts.forEach((text) => {
    const box = el("div.card.spaced");
    runs.forEach((run, n) => {
      const found = (run.texts || []).find((one) => one.text === text);
      if (found) box.append(el("div.text", { "data-run": n }, el("h3", {}, dot(n), run.name), oneText(found)));
    });
    place.append(box);
  });
}

function oneText(text) {
  if (text.left_out !== undefined) return el("p", {}, `Left out, since the tokenizers do not spell it alike: ${text.left_out}`);
  const detail = el("div.detail.soft", {}, "No chunk is chosen.");
  const labels = el("div.side", {}, el("span", {}, "teacher"), el("span", {}, "log p"), el("span", {}, "student"), el("span", {}, "log p"));
  const columns = el("div.chunks", {}, labels);
  const of = (side, chunk) => text.tokens[side].filter((token) => token.chunk === chunk);
  let buttons = [];
  text.chunks.forEach((chunk, n) => {
    const sides = ["teacher", "student"].map((side) => of(side, n));
    if (!sides[0].length || !sides[1].length) return;
    const before = n > 0 && text.chunks[n - 1].group === chunk.group && of("teacher", n - 1).length > 0;
    const after = n + 1 < text.chunks.length && text.chunks[n + 1].group === chunk.group;
    const [t, mass] = chunk.teacher, [s] = chunk.student;
    const row = (tokens) => el("span.row", {}, ...tokens.map((token) => el("span.tok" + (token.special ? ".special" : ""), {}, token.text.replace(/ /g, "\u00a0"))));
    const made = el("button.chunk" + (before ? "" : ".first") + (after ? "" : ".last"), { type: "button", "aria-pressed": "false", own: `var(--g${chunk.group % 4})` },
      row(sides[0]), el("span.gap", {}, minus(t)),
      row(sides[1]), el("span.gap" + (Math.abs(s - t) >= 1 ? ".far" : ""), {}, minus(s)),
      el("span.mass" + (after ? "" : ".ends"), {}, el("i", { style: `width: ${Math.round(100 * mass)}%` })));
    made.onclick = () => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button === made));
      detail.classList.remove("soft");
      const group = text.chunks.filter((other) => other.group === chunk.group);
      const sum = (side) => group.reduce((total, other) => total + other[side][0], 0);
      detail.replaceChildren(
        el("b.mono", {}, sides[0].map((token) => token.text).join("")), ` log p: teacher ${minus3(t)} (${sides[0].map((k) => minus3(k.logp)).join(", ")}), student ${minus3(s)} (${sides[1].map((k) => minus3(k.logp)).join(", ")}). `,
        el("br"), `Boundary mass behind it: teacher ${mass.toFixed(3)}, student ${chunk.student[1].toFixed(3)}. `, why(text, mass, after),
        group.length > 1 ? ` The group of ${group.length} chunks: teacher ${minus3(sum("teacher"))}, student ${minus3(sum("student"))}.` : "");
    };
    buttons.push(made);
    columns.append(made);
  });
  return el("div", {}, columns, detail);
}

const minus = (value, digits = 1) => `${value < 0 ? "\u2212" : ""}${Math.abs(value).toFixed(digits)}`;
const minus3 = (value) => minus(value, 3);

function why(text, mass, after) {
  if (text.ends !== "merged") return after ? `Chunks are \u201c${text.ends}\u201d: the group goes on.` : `Chunks are \u201c${text.ends}\u201d: the group ends here.`;
  if (after) return `That is not above ${text.gamma}, so the group goes on.`;
  return mass > text.gamma ? `That is above ${text.gamma}, so the group ends here.` : "The text ends here, and the group with it.";
}

function showSamples() {
  const place = document.getElementById("samples");
  if (!runs.some((run) => run.samples.length)) return;
  place.append(el("h2", {}, "How the student goes on with held-out text"));
  runs.forEach((run, n) => {
    if (!run.samples.length) return;
    const box = el("div.card.spaced", { "data-run": n }, el("h3", {}, dot(n), run.name));
    run.samples[0].samples.forEach((sample, number) => {
      const list = el("dl.sample", {}, el("dt", {}, "prompt"), el("dd.mono", {}, sample.prompt));
      run.samples.forEach((row) => {
        if (!row.samples[number]) return;
        list.append(el("dt", {}, row.step === 0 ? "student before" : `after ${row.step.toLocaleString("en")} steps`), el("dd.mono", {}, row.samples[number].continuation));
      });
      box.append(list);
    });
    place.append(box);
  });
}

/* --- the page --------------------------------------------------------------------------------------------------- */

function showLegend() {
  const place = document.getElementById("legend");
  runs.forEach((run, n) => {
    const button = el("button", { type: "button", "aria-pressed": "true", own: colour(n), title: "show or hide" }, run.name);
    button.onclick = () => {
      shown[n] = !shown[n];
      button.setAttribute("aria-pressed", String(shown[n]));
      document.querySelectorAll(`[data-run="${n}"]`).forEach((box) => { box.hidden = !shown[n]; });
      redraw();
    };
    place.append(button);
  });
}

showLegend();
showSummary();
makeCharts();
showTexts();
showSamples();
showSettings();
document.getElementById("axis").onchange = (event) => { axis = event.target.value; redraw(); };
document.getElementById("smooth").onchange = redraw;
new ResizeObserver(redraw).observe(document.getElementById("charts"));
