"""Small tokenizers of every kind, as the folders that `load_vocabulary` reads."""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary

LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OLMO = (*CHATML, "<|pad|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]")
TEXT = (
    "the user said to the model: hello there, all the world\n\n  and the rest\tof it. é ü 日本 日 本語 \n the end. " * 3
)


def _turns(start: str, **turns: str) -> str:
    """A chat template that writes each role's turn in its own way; other roles are refused."""
    cases = "".join(
        f"{{%- {'if' if number == 0 else 'elif'} m.role == '{role}' -%}}{{{{- {turn} -}}}}"
        for number, (role, turn) in enumerate(turns.items())
    )
    other = "{%- else -%}{{- raise_exception('no role ' ~ m.role) -}}{%- endif -%}"
    return f"{{{{- {start} -}}}}{{%- for m in messages -%}}{cases}{other}{{%- endfor -%}}"


_CHATML = "'<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n'"
_DEFAULT = "('' if messages[0].role == 'system' else '<|im_start|>system\\nBe good.<|im_end|>\\n')"
_LLAMA = "'<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content ~ '<|eot_id|>'"
_OLMO2 = "'<|' ~ m.role ~ '|>\\n' ~ m.content ~ '\\n'"
_ZEPHYR = "{% for m in messages %}\n{{ '<|' ~ m['role'] ~ '|>\\n' ~ m['content'] ~ eos_token }}\n{% endfor %}"
# A chat template in the manner of each family, written for the tests.
CHATS = {
    "llama": _turns("bos_token", system=_LLAMA, user=_LLAMA, assistant=_LLAMA),
    "gemma": _turns(
        "bos_token",
        user="'<start_of_turn>user\\n' ~ m.content | trim ~ '<end_of_turn>\\n'",
        assistant="'<start_of_turn>model\\n' ~ m.content | trim ~ '<end_of_turn>\\n'",
    ),
    "qwen": _turns(_DEFAULT, system=_CHATML, user=_CHATML, assistant=_CHATML),
    "smollm": _turns(_DEFAULT, system=_CHATML, user=_CHATML, assistant=_CHATML),
    "tinyllama": _ZEPHYR,
    "mistral1": _turns("bos_token", user="'[INST] ' ~ m.content ~ ' [/INST]'", assistant="m.content ~ eos_token"),
    "mistral3": _turns("bos_token", user="'[INST] ' ~ m.content ~ '[/INST]'", assistant="' ' ~ m.content ~ eos_token"),
    "tekken": _turns("bos_token", user="'[INST]' ~ m.content ~ '[/INST]'", assistant="m.content ~ eos_token"),
    "olmo2": _turns(
        "bos_token",
        system=_OLMO2,
        user=_OLMO2,
        assistant="'<|assistant|>\\n' ~ m.content ~ eos_token ~ ('' if loop.last else '\\n')",
    ),
    "olmo3": _turns(
        _DEFAULT,
        system="'<|im_start|>system\\n' ~ m.content ~ ' No functions. <functions></functions><|im_end|>\\n'",
        user=_CHATML,
        assistant="'<|im_start|>assistant\\n' ~ m.content ~ (eos_token if loop.last else '<|im_end|>\\n')",
    ),
}


def save(
    folder: Path, tokenizer: Tokenizer, special: Sequence[str], ordinary: Sequence[str] = (), **config: object
) -> Path:
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ordinary])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
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


def make(kind: str, folder: Path, template: str | None = None) -> Vocabulary:
    """A vocabulary as `vocabulary` gives it, its folder `folder`, and its own chat template in there."""
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
    elif kind == "smollm":
        path = save(folder, byte_level(290), CHATML, bos_token=CHATML[1], eos_token=CHATML[2], pad_token=CHATML[2])
    elif kind in ("tinyllama", "mistral1", "mistral3"):
        tokenizer = sentencepiece(kind == "tinyllama")
        if kind != "tinyllama":
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        special = MISTRAL if kind == "mistral3" else MISTRAL[:2]
        path = save(folder, tokenizer, special, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    elif kind == "tekken":
        path = save(folder, byte_level(), [*MISTRAL, "<pad>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    elif kind in ("olmo2", "olmo3"):
        path = save(folder, byte_level(), OLMO, bos_token=OLMO[0], eos_token=OLMO[0], pad_token=OLMO[3])
    else:
        return byte_vocabulary(vocabulary(kind.removeprefix("bytes of ")))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return load_vocabulary(path)


@cache
def vocabulary(kind: str) -> Vocabulary:
    """One of CHATS without a template of its own, or llama2, metaspace, or "bytes of " one of them."""
    with tempfile.TemporaryDirectory() as folder:
        return make(kind, Path(folder) / "tokenizer")
