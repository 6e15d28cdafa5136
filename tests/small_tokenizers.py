"""Small tokenizers of every kind, as the folders that `load_vocabulary` reads."""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minalm.vocab import Vocabulary, byte_vocabulary, load_vocabulary

LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = (
    "the user said to the model: hello there, all the world\n\n  and the rest\tof it. é ü 日本 日 本語 \n the end. " * 3
)


def save(
    folder: Path, tokenizer: Tokenizer, control: Sequence[str], ordinary: Sequence[str] = (), **config: object
) -> Path:
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ordinary])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(size: int = 320, text: str = TEXT, alphabet: Sequence[str] | None = None) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, Llama 3's and Qwen's, with pieces that end inside characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentencepiece(prefix_space: bool, byte_fallback: bool = True) -> Tokenizer:
    """BPE over characters that writes a space as U+2581: Gemma's kind, and Llama 2's with a space before a text."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    letters = sorted(set(TEXT.replace(" ", "\u2581")) - set("語"))
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581"), ("l", "l"), ("日", "本"), ("e", "r")]
    merges += [("u", "s"), ("us", "er"), ("m", "o"), ("d", "e"), ("mo", "de"), ("mode", "l"), ("\n", "\n")]
    pieces = ["<unk>", *fallback, *letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    steps = [normalizers.Prepend("\u2581")] * prefix_space + [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _make(kind: str, folder: Path) -> Vocabulary:
    if kind == "llama":
        path = save(folder, byte_level(), LLAMA, eos_token=LLAMA[3], pad_token=LLAMA[4], bos_token=LLAMA[0])
    elif kind == "qwen":
        tokenizer = byte_level(290)
        tokenizer.normalizer = normalizers.NFC()
        path = save(folder, tokenizer, CHATML, ["<think>"], eos_token="<|im_end|>", pad_token={"content": CHATML[0]})
    elif kind == "gemma":
        ordinary = ["\n\n\n", "\u2581\u2581\u2581", "<b>"]
        path = save(
            folder, sentencepiece(False), GEMMA, ordinary, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )
    elif kind == "llama2":
        path = save(folder, sentencepiece(True), ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    elif kind == "metaspace":
        tokenizer = sentencepiece(False)
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        path = save(folder, tokenizer, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    else:
        return byte_vocabulary(vocabulary(kind.removeprefix("bytes of ")))
    return load_vocabulary(path)


@cache
def vocabulary(kind: str) -> Vocabulary:
    """llama, qwen, gemma, llama2, metaspace, or "bytes of " one of them."""
    with tempfile.TemporaryDirectory() as folder:
        return _make(kind, Path(folder) / "tokenizer")
