"""Bytes a second of generation, beside transformers.generate on the same folder, in turn in one run.

    python benchmarks/generate.py speed FOLDER                 # of minalm and transformers, batch 1 and 8
    python benchmarks/generate.py context FOLDER               # milliseconds a token at contexts of 100 to 4,000
    python benchmarks/generate.py speculation FOLDER [DRAFT]   # with drafts and without
    python benchmarks/generate.py early FOLDER                 # how often the first blocks alone would draft right
    python benchmarks/generate.py beside FOLDER OTHER          # two models, a Bolmo among them, batch 1 and 8

Greedy, float32. XLA has all CPUs, transformers as many threads as it is fastest with; what is compiled, or otherwise done once, is not counted. Prompts
are the beginnings of this repository's documents. On a machine that does other work too, the ratios mean more than
the numbers: what is compared takes turns, and the medians of the turns are shown.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minalm.evaluation.scoring import Request, Scorer
from minalm.generation.engine import DRAFTS, Generator
from minalm.generation.kinds import generator_of
from minalm.generation.sampling import SamplingConfig
from minalm.generation.speculation import LookupDraft, ModelDraft, Pace, speculate
from minalm.huggingface.loaded import LoadedModel, model_folder
from minalm.parallel.mesh import make_mesh
from minalm.text.documents import Segment

ROOT = Path(__file__).parents[1]
FLOAT32 = jnp.dtype(jnp.float32)
GREEDY = SamplingConfig()


def prompts(loaded: LoadedModel, count: int, size: int) -> list[np.ndarray]:
    """The ids of pieces of so many bytes of the repository's documents."""
    text = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "ARCHITECTURE.md"))
    pieces = [(Segment(text[start : start + size]),) for start in range(0, size * count, size)]
    return [encoding.ids for encoding in loaded.vocabulary.encode(pieces)]


def written(loaded: LoadedModel, rows: list[list[int]]) -> int:
    """Bytes of text in rows of ids."""
    return sum(len(loaded.vocabulary.token_bytes[i]) for row in rows for i in row)


def of_transformers(folder: Path, loaded: LoadedModel):
    """A function that goes on with prompts by transformers.generate."""
    import torch
    import transformers

    code = {"trust_remote_code": True} if loaded.suffixes is not None else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **code).eval()

    def generate(rows, new):
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row.tolist() for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
            )
        return found[:, longest:].tolist()

    seconds = {}  # on a machine that does other work, one thread can be much faster than several that wait for another
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        torch.set_num_threads(threads)
        for _ in range(2):
            began = time.perf_counter()
            generate([np.ones(60, np.int64)], 16)
            seconds[threads] = time.perf_counter() - began
    torch.set_num_threads(min(seconds, key=seconds.get))
    print(f"transformers with {torch.get_num_threads()} threads")
    return generate


def in_turn(ways: dict[str, Callable[[], list[list[int]]]], turns: int) -> tuple[dict[str, float], dict[str, list]]:
    """(the median of the seconds that each way takes, what each writes)."""
    texts = {name: way() for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(of_way) for name, of_way in seconds.items()}, texts


def speed(folder: Path, new: int, turns: int) -> None:
    """A table of both, at batch 1 and 8."""
    loaded = LoadedModel.read(folder)
    generator, theirs = generator_of([loaded], make_mesh(1, 1), FLOAT32), of_transformers(folder, loaded)
    print("| batch | minalm, bytes a second | transformers | ratio | same text |\n|---|---|---|---|---|")
    for batch in (1, 8):
        rows = prompts(loaded, batch, 60)
        ways = {
            "ours": lambda rows=rows: generator.generate(rows, GREEDY, new, ()),
            "theirs": lambda rows=rows: theirs(rows, new),
        }
        seconds, texts = in_turn(ways, turns)
        rate = {name: written(loaded, texts[name]) / seconds[name] for name in ways}
        same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"]))
        print(
            f"| {batch} | {rate['ours']:,.0f} | {rate['theirs']:,.0f} | {rate['ours'] / rate['theirs']:.1f} "
            f"| {same} of {batch} |",
            flush=True,
        )


def beside(folder: Path, other: Path, new: int, turns: int) -> None:
    """A table of two models, at batch 1 and 8."""
    models = {str(name): LoadedModel.read(name) for name in (folder, other)}
    generators = {name: generator_of([loaded], make_mesh(1, 1), FLOAT32) for name, loaded in models.items()}
    print("| model | batch | bytes a second |\n|---|---|---|")
    for batch in (1, 8):
        ways = {
            name: lambda name=name, rows=prompts(loaded, batch, 60): generators[name].generate(rows, GREEDY, new, ())
            for name, loaded in models.items()
        }
        seconds, texts = in_turn(ways, turns)
        for name, loaded in models.items():
            print(f"| {name} | {batch} | {written(loaded, texts[name]) / seconds[name]:,.0f} |", flush=True)


def context(folder: Path, new: int, turns: int) -> None:
    """Milliseconds a token behind prompts of some lengths."""
    loaded = LoadedModel.read(folder)
    generator = Generator.of([loaded], make_mesh(1, 1), FLOAT32)
    lengths = (100, 250, 500, 1000, 2000, 4000)
    [ids] = prompts(loaded, 1, 16_000)
    seconds = {length: [] for length in lengths}
    print("| tokens before | ms a token |\n|---|---|")
    for turn in range(turns + 1):
        for length in lengths:
            row = [ids[:length]]
            generator.generate(row, GREEDY, 1, ())  # reads the prompt, which stays
            began = time.perf_counter()
            generator.generate(row, GREEDY, new, ())
            seconds[length] += [time.perf_counter() - began] if turn else []
    for length in lengths:
        print(f"| {length:,} | {1e3 * statistics.median(seconds[length]) / new:.2f} |", flush=True)


def speculation(folder: Path, draft: Path | None, new: int, turns: int) -> None:
    """Bytes a second without drafts, with prompt lookup, and with the subword model."""
    loaded, mesh = LoadedModel.read(folder), make_mesh(1, 1)
    generator = Generator.of([loaded], mesh, FLOAT32)
    drafts = {"none": lambda: None, "lookup": LookupDraft}
    if draft is not None:
        subwords = Generator.of([LoadedModel.read(draft)], mesh, FLOAT32)
        drafts["model"] = lambda: ModelDraft(subwords, loaded.vocabulary)
    rows = prompts(loaded, 4, 400)
    rates, notes, texts = {name: [] for name in drafts}, {}, {}
    paces = {name: Pace() for name in drafts}
    for turn in range(turns + 1):
        for name, make in drafts.items():
            began, found, notes[name] = time.perf_counter(), [], []
            for row in rows:
                maker = make()
                if maker is None:
                    found += generator.generate([row], GREEDY, new, ())
                else:
                    ids, note = speculate(generator, row, maker, GREEDY, new, (), pace=paces[name])
                    found.append(ids)
                    notes[name].append(note)
            rates[name] += [written(loaded, found) / (time.perf_counter() - began)] if turn else []
            texts[name] = found
    print("| draft | bytes a second | ratio | accepted | same text |\n|---|---|---|---|---|")
    for name, rate in rates.items():
        proposed, accepted = (sum(getattr(n, part) for n in notes[name]) for part in ("proposed", "accepted"))
        share = f"{accepted:,} of {proposed:,}" if notes[name] else ""
        same = f"{sum(a == b for a, b in zip(texts[name], texts['none']))} of {len(rows)}"
        ratio = statistics.median(a / b for a, b in zip(rate, rates["none"]))
        print(f"| {name} | {statistics.median(rate):,.0f} | {ratio:.2f} | {share} | {same} |", flush=True)


def first_blocks(loaded: LoadedModel, count: int) -> LoadedModel:
    """The model without all blocks but the first `count`."""
    model = loaded.model
    config = dataclasses.replace(model.config, layers=count, windows=model.config.windows[:count])
    blocks, last = (
        jax.tree.map(lambda leaf, part=part: leaf[part], model.blocks) for part in (slice(count - 1), count - 1)
    )
    return dataclasses.replace(loaded, model=dataclasses.replace(model, blocks=blocks, last=last, config=config))


def early(folder: Path, new: int) -> None:
    """How many of the bytes that the model writes its first blocks alone, with its norm and head, would choose too. The
    last column is what drafts by them could be worth if checking them took no longer than making one byte."""
    loaded, mesh = LoadedModel.read(folder), make_mesh(1, 1)
    rows = prompts(loaded, 4, 400)
    texts = Generator.of([loaded], mesh, FLOAT32).generate(rows, GREEDY, new, ())
    requests = [Request((row,), np.array(text, np.int32)) for row, text in zip(rows, texts, strict=True)]
    depth = loaded.model.config.layers
    print("| first blocks | the same byte | speed without drafts = 1, at most |\n|---|---|---|")
    for count in range(2, depth, max(depth // 6, 1)):
        scores = Scorer([first_blocks(loaded, count)], mesh, FLOAT32)(requests)
        rate = float(np.concatenate([score.greedy for score in scores]).mean())
        best = max(
            sum(rate**n for n in range(size + 1)) / (1 + size * count / depth) for size in range(1, DRAFTS[-1] + 1)
        )
        print(f"| {count} of {depth} | {rate:.1%} | {best:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "context", "speculation", "early", "beside"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("draft", type=Path, nargs="?", help="or the other model")
    parser.add_argument("--new", type=int, default=192, help="tokens to write")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    folder = model_folder(options.folder)
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}, JAX {jax.__version__}, {folder.name}")
    if options.what == "speculation":
        speculation(folder, options.draft, options.new, options.turns)
    elif options.what == "early":
        early(options.folder, options.new)
    elif options.what == "beside":
        beside(options.folder, options.draft, options.new, options.turns)
    else:
        {"speed": speed, "context": context}[options.what](folder, options.new, options.turns)


if __name__ == "__main__":
    main()
