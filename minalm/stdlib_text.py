"""Text that every machine with Python has: the standard library's sources and documentation, and a tokenizer of it.

`python -m minalm.stdlib_text --bpe 4096 OUT` trains a byte-level BPE on the training split and writes the folder OUT.
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minalm.text import InputError

HELD_OUT = 0.05  # share of the documents

# Neither tests nor tables of encodings, nor what is installed on top of the library.
_SKIPPED = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# Words may start with a space, a mark or both (" x", "_x", " self", ' "x'), digits stand alone, and white space goes
# in one token up to the last space before a word: 3.75 bytes a token of held-out text at 4,096 entries, where GPT-2's
# pattern has 3.60 and Llama 3's 3.67 (both with single digits).
PATTERN = r" ?[^\s\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?= [^\s\p{N}])|\s+"


def stdlib_documents(split: Literal["training", "held_out"], fraction: float = 1.0) -> list[str]:
    """The .py files of this Python's standard library, one document each, read where they lie, in order of their paths.

    Of every training file `pydoc_data/topics.py`, the language reference, is the largest. Which split a file is in, and
    whether it is in a smaller `fraction` (0 to 1, a share of the documents; a larger one contains the smaller), depends
    on its path relative to the library alone, so that no Python trains on what another holds out. Raises InputError if
    there are none.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        name = path.relative_to(library)
        if _SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):  # the latter holds local paths
            continue
        place, share = _places(name.as_posix())
        if (place < HELD_OUT) == (split == "held_out") and share < fraction:
            try:
                documents.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue  # an old source in another encoding
    if not documents:
        raise InputError(f"no sources of the {split} split are in {library}: use a Python installed with its library")
    return documents


def train_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE, special tokens and the 256 bytes included, and writes it in the Hugging Face layout.

    `folder` is made, with tokenizer.json and tokenizer_config.json. Raises InputError if it exists, or if the documents
    do not give `vocab_size` tokens.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: name a folder that does not")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise InputError(f"a vocabulary of {vocab_size} has no room for the 256 bytes: give at least 258")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"the documents give only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: give more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def main(folder: tyro.conf.Positional[Path], bpe: int) -> None:
    """Train a byte-level BPE on the training split of the standard library.

    Args:
        folder: where to write it; must not exist.
        bpe: number of tokens.
    """
    try:
        train_bpe(stdlib_documents("training"), bpe, folder)
    except InputError as error:
        sys.exit(f"error: {error}")


def _places(name: str) -> tuple[float, float]:
    """Two numbers in [0, 1) that spread names evenly. Changing them changes every split, so runs no longer compare."""
    # With this prefix the language reference, a fifteenth of all text, is in training, and shares of the documents are
    # near the same shares of the bytes.
    digest = hashlib.sha256(f"minalm 4:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64


if __name__ == "__main__":
    tyro.cli(main)
