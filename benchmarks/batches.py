"""How fast batches are made, beside what the tokenizers library alone needs for the teacher's side of the same texts.

    python benchmarks/batches.py [--batches 12] [--rounds 3]        (RAYON_NUM_THREADS=1 for one thread)

"rendering" is the milliseconds that the chat template takes for a batch, which a run pays too if its texts are chats.

Batches of 32 two-turn chats of 1.7 to 2.5 kB: one third standard-library sources, one third `pydoc_data/topics.py`,
one third multilingual (the translations of vim's tutor and gnupg's help files, from Debian's packages). The tokenizers
are real, see tests/real_tokenizers.py, and new to the texts of every batch, for they cache words.
"""

import argparse
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
from real_tokenizers import real_tokenizer

from minalm.batches import Side, make_batch
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.prefixes import find_prefixes
from minalm.tokenization.suffixes import longest_suffix
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import byte_vocabulary, with_special_tokens

ROWS = 32
PAIRS = {  # teacher, student, lengths of student and teacher, with what the loss next_byte reads
    "Gemma 2 -> bytes": ("gemma2", None, 2048, 512, False),
    "  for next_byte": ("gemma2", None, 2048, 512, True),
    "Llama 3 -> bytes": ("llama3", None, 2048, 512, False),
    "  for next_byte ": ("llama3", None, 2048, 512, True),
    "Llama 3 -> Qwen": ("llama3", "qwen3", 512, 512, False),
}


def multilingual() -> str:
    """The texts of two Debian packages; where apt cannot fetch them, what is installed here of the same kind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # apt downloads as a user of its own
        try:
            for package in ("vim-runtime", "gnupg"):
                subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
            for package in Path(folder).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True, capture_output=True)
            files = [*Path(folder).rglob("tutor.*utf-8"), *Path(folder).rglob("gnupg/help.*.txt")]
            return "\n".join(file.read_text("utf-8") for file in sorted(files))
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"no Debian packages ({error}): the multilingual third is the standard library's encoding tests instead"
            )
    tests = Path(sysconfig.get_path("stdlib"), "test", "cjkencodings")
    return "\n".join(file.read_text("utf-8") for file in sorted(tests.glob("*-utf8.txt"))) * 20


def chats(number: int) -> list[list[dict[str, Any]]]:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kinds = [
        "\n".join(source.read_text("utf-8", "replace") for source in sources).encode(),
        "".join(pydoc_data.topics.topics.values()).encode(),
        multilingual().encode(),
    ]
    draw = random.Random(0)

    def chat(kind: bytes) -> dict[str, Any]:
        size = draw.randint(1700, 2500)
        start = draw.randrange(len(kind) - size)
        text = kind[start : start + size].decode(errors="ignore")
        middle = draw.randint(len(text) // 4, len(text) // 2)
        turns = (("user", text[:middle]), ("assistant", text[middle:]))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    return [[chat(kinds[row % 3]) for row in range(ROWS)] for _ in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12, help="batches a round, all different")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with tokenizers that have seen no text")
    options = parser.parse_args()
    batches = chats(options.batches)
    texts = [[message["content"] for row in batch for message in row["messages"]] for batch in batches]
    size = sum(len(text.encode()) for batch in texts for text in batch)
    print(f"{len(batches)} batches of {ROWS} chats, {size / len(batches) / ROWS:.0f} bytes of text each\n")
    print(
        f"{'pair':18}{'texts/s':>9}{'library':>9}{'ratio':>7}   (best; medians) {'ms/batch':>9}{'library':>9}", end=""
    )
    print(f"{'ratio':>7}{'rendering':>11}{'bytes/batch':>13}{'left out':>10}{'set-up s':>10}")
    for name, (teacher_name, student_name, student_length, teacher_length, next_byte) in PAIRS.items():
        paths = {key: real_tokenizer(key) for key in (teacher_name, student_name) if key}
        ours, library, setup, rendering = [], [], [], []
        for _ in range(options.rounds):
            start = time.perf_counter()
            teacher = load_vocabulary(paths[teacher_name])
            if student_name is None:
                student = byte_vocabulary(teacher)
                suffixes = longest_suffix(teacher, student)
            else:
                student, suffixes = with_special_tokens(load_vocabulary(paths[student_name]), teacher), None
            prefixes = find_prefixes(teacher, student, teacher.size, student.size) if next_byte else None
            sides = Side(student, suffixes, student_length), Side(teacher, None, teacher_length, prefixes)
            make_batch([], *sides)
            setup.append(time.perf_counter() - start)

            alone = Tokenizer.from_file(str(paths[teacher_name] / "tokenizer.json"))
            left_out = 0
            read_chat = ChatReader(student, teacher, False, "2026-01-01")
            read_chat(batches[0][0])
            for rows, contents in zip(batches, texts):  # in turn, so that both meet the same load of the machine
                start = time.perf_counter()
                pieces = [read_chat(row) for row in rows]
                rendering.append(time.perf_counter() - start)
                start = time.perf_counter()
                alone.encode_batch_fast(contents, add_special_tokens=False)
                library.append(time.perf_counter() - start)
                start = time.perf_counter()
                batch = make_batch(pieces, *sides)
                ours.append(time.perf_counter() - start)
                left_out += batch.left_out.sum()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
        best, fastest = min(ours), min(library)
        middle, usual = statistics.median(ours), statistics.median(library)
        print(f"{name:18}{ROWS / best:9.0f}{ROWS / fastest:9.0f}{fastest / best:7.2f}{1e3 * middle:28.1f}", end="")
        print(
            f"{1e3 * usual:9.1f}{usual / middle:7.2f}{1e3 * statistics.median(rendering):11.1f}{size:13,}{left_out:10}{min(setup):10.2f}"
        )


if __name__ == "__main__":
    main()
