"""Text at size: how long a first and a later start take, what memory 1,000 steps take, and whether batches keep ahead.

    python benchmarks/data.py size [--rows 10000000]          # rows of text in one .jsonl file, in a folder that is removed
    python benchmarks/data.py ahead [--step 0.3] [--packing]  # batches of 32 x 2048 for Gemma 2 -> bytes, from .jsonl chats
    python benchmarks/data.py share [PATH...]                 # useful share of rows before and after packing; else Python's library

Seconds are of the clock and, in brackets, of processors. `ahead` takes the texts and the tokenizer of batches.py.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

SENTENCES = 997  # distinct ones, so that lines differ in length and content


def write_rows(path: Path, rows: int) -> None:
    """Lines of 60 to 900 bytes, 300 on average."""
    draw = np.random.default_rng(0)
    words = np.array(
        ["model", "reads", "bytes", "of", "the", "text", "token", "caf\u00e9", "and", "\u65e5\u672c", "writes"]
    )
    texts = [" ".join(draw.choice(words, size)) for size in draw.gamma(2.0, 25.0, SENTENCES).astype(int) + 5]
    lines = [json.dumps({"text": text, "source": "made"}, ensure_ascii=False)[1:].encode() for text in texts]
    with path.open("wb", 1 << 22) as file:
        for n in range(rows):
            file.write(b'{"id": %d, %s\n' % (n, lines[n % SENTENCES]))


def resident() -> float:
    """Megabytes of this process's own memory, without what it maps of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Clock:
    """Seconds of the clock and of processors, those of processes that go on (chat templates) included."""

    def __init__(self) -> None:
        self.began, self.used = time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        total = sum(os.times()[:4])
        for children in Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                fields = Path("/proc", child, "stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def __str__(self) -> str:
        return f"{time.perf_counter() - self.began:.2f} s ({self._cpu() - self.used:.2f})"


def start(path: str, cache: str, steps: int) -> None:
    """One start of a process: what `size` measures."""
    from minalm.text.corpus import read_corpus

    clock = Clock()
    corpus = read_corpus([Path(path)], 2048, cache=Path(cache))
    first = corpus.batch(0, 0, 32)
    print(f"{clock}, the first batch of 32 included; {len(corpus):,} pieces, {len(first)} in it", flush=True)
    if steps:
        before = resident()
        clock = Clock()
        shown = []
        for step in range(1, steps + 1):
            corpus.batch(0, step, 32)
            if step % (steps // 4) == 0:
                shown.append(f"{resident():.0f}")
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{steps} batches in {clock}; own memory {before:.0f} MB before, {', '.join(shown)} MB after each quarter"
        )
        print(f"most resident at any time, mapped index included: {largest:.0f} MB")


def size(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder, "rows.jsonl"), Path(folder, "cache")
        write_rows(path, rows)
        print(f"{rows:,} rows, {path.stat().st_size / 1e9:.2f} GB")
        for title, steps in (("first start: ", 0), ("later start: ", 1000)):
            print(title, end="", flush=True)
            command = [sys.executable, __file__, "start", str(path), str(cache), "--steps", str(steps)]
            subprocess.run(command, check=True)
        kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        print(f"index: {kept / 1e6:.0f} MB, {kept / rows:.0f} bytes a row")


def ahead(step_seconds: float, steps: int, packing: bool) -> None:
    from batches import ROWS, chats
    from real_tokenizers import real_tokenizer

    from minalm.batches import Side, make_batch, make_packed_batch, read_ahead
    from minalm.text.corpus import read_corpus
    from minalm.text.rows import RowReader
    from minalm.tokenization.chats import ChatReader
    from minalm.tokenization.suffixes import longest_suffix
    from minalm.tokenization.tokenizer_json import load_vocabulary
    from minalm.tokenization.vocabulary import byte_vocabulary

    teacher = load_vocabulary(real_tokenizer("gemma2"))
    student = byte_vocabulary(teacher)
    sides = Side(student, longest_suffix(teacher, student), 2048), Side(teacher, None, 512)
    for mask_prompt in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "chats.jsonl")
            rows = [{"messages": messages["messages"]} for batch in chats(steps + 8) for messages in batch]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            reader = RowReader(ChatReader(student, teacher, mask_prompt, "2026-01-01"), mask_prompt=mask_prompt)
            clock = Clock()
            corpus = read_corpus([path], 2048, reader, Path(folder, "cache"))
            print(f"mask_prompt {mask_prompt}: {len(rows):,} chats indexed in {clock}", flush=True)
            count = ROWS * 5 // 4 if packing else ROWS

            def make(step: int):
                pieces = corpus.batch(0, step, count)
                return make_packed_batch(pieces, *sides, ROWS) if packing else make_batch(pieces, *sides)

            with contextlib.closing(read_ahead(make, 0)) as made:
                next(made)
                waited, clock = [], Clock()
                for _ in range(steps):
                    time.sleep(step_seconds)
                    began = time.perf_counter()
                    next(made)
                    waited.append(time.perf_counter() - began)
            late = sum(wait > 0.01 for wait in waited)
            print(
                f"  {steps} steps of {step_seconds} s: {np.mean(waited) * 1e3:.1f} ms of waiting a step, {late} steps late; "
                f"{clock} in all"
            )


def share(paths: list[Path], lengths: tuple[int, int], rows: int) -> None:
    from minalm.batches import Side, sizes_of
    from minalm.packing import packed_counts
    from minalm.presets import TEACHER
    from minalm.text.corpus import read_corpus
    from minalm.text.rows import RowReader
    from minalm.text.stdlib import stdlib_documents
    from minalm.tokenization.chats import ChatReader
    from minalm.tokenization.tokenizer_json import load_vocabulary
    from minalm.tokenization.vocabulary import byte_vocabulary

    teacher = load_vocabulary(TEACHER)
    student = byte_vocabulary(teacher)
    reader = RowReader(ChatReader(student, teacher, False, "2026-01-01"))
    corpus = read_corpus(paths or ["stdlib"], lengths[0], reader, stdlib=lambda: stdlib_documents("training"))
    sides = Side(student, None, lengths[0]), Side(teacher, None, lengths[1])
    sizes = sizes_of(corpus.batch(0, 0, min(4096, len(corpus))), *sides)
    counts = packed_counts(sizes, lengths, rows)
    alone = sizes.student.mean() / lengths[0]
    print(
        f"{len(corpus):,} pieces; {alone:.1%} useful unpacked; {np.mean(counts):.1f} +- {np.std(counts):.1f} texts fit {rows} rows"
    )
    for less in (0.0, 0.5, 1.0):
        count = int(np.mean(counts) - less * np.std(counts))
        waiting = np.mean([max(0, count - each) for each in counts]) / count
        print(f"  {count} texts: {alone * count * (1 - waiting) / rows:.1%} useful, {waiting:.1%} find no room")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("size", "ahead", "share", "start"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=64, help="rows that are packed at once")
    parser.add_argument("--lengths", type=int, nargs=2, default=(2048, 512))
    parser.add_argument("--packing", action="store_true")
    given = parser.parse_args()
    if given.what == "size":
        size(given.rows)
    elif given.what == "start":
        start(*map(str, given.paths), given.steps)
    elif given.what == "ahead":
        ahead(given.step, given.steps, given.packing)
    else:
        share(given.paths, tuple(given.lengths), given.batch)
