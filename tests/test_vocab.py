"""Vocabularies: bytes of tokens, special tokens and templates, encoding."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, GEMMA, LLAMA, byte_level, save, sentencepiece, vocabulary
from tokenizers import pre_tokenizers

from minalm.errors import InputError
from minalm.text.documents import Segment, Special
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary, with_special_tokens

KINDS = ("llama", "qwen", "gemma", "llama2", "metaspace", "bytes of llama", "bytes of gemma")
# Characters that these tokenizers have pieces of, spell byte by byte, or could mistake for something else.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "  ", "\n\n\n", "the", " the", "user", "日本", "語", "\u2581", "é", "e\u0301", "\0", "<0x41>"]
        ),
        st.sampled_from([*LLAMA, *GEMMA, *CHATML, "<s>", "<think>", "<b>", "<unk>", "\U0010ffff", "Ġ", "Â"]),
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)


def text_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.encode([(Segment(text),)])[0].ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_text_is_spelled_and_never_becomes_special(kind, text):
    ours = vocabulary(kind)
    text = ours.normalize(text)
    (encoding,) = ours.encode([(Segment(text),)])
    assert not set(ours.special.values()) & set(encoding.ids.tolist())
    spelled = b"".join(ours.token_bytes[i] for i in encoding.ids)
    if kind in ("llama2", "metaspace"):
        assert encoding.round_trips  # the dummy space before a text is not the text's
        assert spelled in (text.encode(), b" " + text.encode())
    else:
        assert encoding.round_trips
        assert spelled == text.encode()
        assert ours.decode(encoding.ids) == text
    if encoding.round_trips and text:
        ends = encoding.ends[encoding.ends >= 0]
        assert ends[-1] == len(text.encode()) == encoding.text_bytes.sum()
        assert (np.diff(ends) > 0).all()
        np.testing.assert_array_equal(np.cumsum(encoding.text_bytes)[encoding.ends >= 0], ends)


def test_unspelled_text_is_found():
    assert not vocabulary("qwen").encode([(Segment("e\u0301"),)])[0].round_trips  # not normalised before
    ok, bad = vocabulary("qwen").encode([(Segment("a"), Segment("b")), (Segment("a"), Segment("e\u0301"))])
    assert ok.round_trips and not bad.round_trips


def test_dummy_space_is_part_of_the_first_token_or_a_token_without_length():
    ours = vocabulary("llama2")
    (encoding,) = ours.encode([(Segment(Special("bos")), Segment("the 1"), Segment(Special("eos")))])
    assert [ours.token_bytes[i] for i in encoding.ids] == [b"", b" the", b" ", b"1", b""]
    assert encoding.ends.tolist() == [1, 4, 5, 6, 7]
    (encoding,) = ours.encode([(Segment("1"),)])
    assert [ours.token_bytes[i] for i in encoding.ids] == [b" ", b"1"]
    assert encoding.ends.tolist() == [-1, 1] and encoding.text_bytes.tolist() == [0, 1]


def test_the_dummy_space_comes_once():
    """Not after a literal U+2581, which divides a text, nor before a text that goes on."""
    for kind in ("llama2", "metaspace"):
        ours = vocabulary(kind)
        (encoding,) = ours.encode([(Segment("a\u2581b"), Segment("the"))])
        assert encoding.round_trips
        assert b"".join(ours.token_bytes[i] for i in encoding.ids) == " a\u2581bthe".encode()


def test_bytes_of_tokens():
    gemma = vocabulary("gemma")
    ids = gemma.tokenizer.get_vocab(with_added_tokens=True)
    for token, spelled in {"\u2581the": b" the", "<0x41>": b"A", "a": b"a", "<b>": b"<b>", "<bos>": b""}.items():
        assert gemma.token_bytes[ids[token]] == spelled
    assert gemma.token_bytes[ids["\u2581\u2581\u2581"]] == b"   "
    assert gemma.id_of_bytes[b"a"] == ids["a"] and gemma.id_of_bytes[b"B"] == ids["<0x42>"]
    assert ids["<0x61>"] < ids["a"]  # so that the text piece wins in spite of its id
    llama = vocabulary("llama")
    ids = llama.tokenizer.get_vocab()
    assert llama.token_bytes[ids["Ġthe"]] == b" the" and llama.token_bytes[ids["Ċ"]] == b"\n"
    assert sorted(token for token in llama.token_bytes if len(token) == 1) == [bytes([byte]) for byte in range(256)]


def test_added_tokens_that_are_not_special_are_text():
    qwen, gemma = vocabulary("qwen"), vocabulary("gemma")
    assert text_ids(qwen, "<think>") == [qwen.tokenizer.token_to_id("<think>")]
    assert text_ids(gemma, "\n\n\n") == [gemma.tokenizer.token_to_id("\n\n\n")]


CHAT = (
    "bos",
    "header_open",
    "user",
    "header_close",
    "hi",
    "end_of_turn",
    "header_open",
    "assistant",
    "header_close",
    "end_of_turn",
)


@pytest.mark.parametrize(
    "kind, words",
    {
        "llama": (
            [
                LLAMA[0],
                LLAMA[1],
                "user",
                LLAMA[2],
                "\n\n",
                "hi",
                LLAMA[3],
                LLAMA[1],
                "assistant",
                LLAMA[2],
                "\n\n",
                LLAMA[3],
            ]
        ),
        "gemma": (
            [
                "<bos>",
                GEMMA[3],
                "user",
                "\n",
                "hi",
                "<end_of_turn>",
                "\n",
                GEMMA[3],
                "model",
                "\n",
                "<end_of_turn>",
                "\n",
            ]
        ),
        "qwen": [CHATML[1], "user", "\n", "hi", CHATML[2], "\n", CHATML[1], "assistant", "\n", CHATML[2], "\n"],
    }.items(),
)
def test_chat_templates(kind, words):
    piece = tuple(Segment(part if part == "hi" else Special(part)) for part in CHAT)
    for ours in (vocabulary(kind), byte_vocabulary(vocabulary(kind))):
        (encoding,) = ours.encode([piece])
        tokens = [[ours.special[word]] if word in ours.special else text_ids(ours, word) for word in words]
        assert encoding.ids.tolist() == [i for token in tokens for i in token]
        # Every part ends where it does for every other vocabulary, its other tokens nowhere.
        places = [end for end in encoding.ends if end >= 0 and end not in (5, 6)]
        assert places == [place for place in (1, 2, 3, 4, 7, 8, 9, 10, 11) if kind != "qwen" or place != 1]


def test_template_follows_tokenizer_config(tmp_path):
    tokenizer = byte_level()
    smollm = save(tmp_path / "s", tokenizer, CHATML, bos_token=CHATML[1], eos_token=CHATML[2], pad_token=CHATML[2])
    parts = load_vocabulary(smollm).template
    assert (parts["bos"], parts["eos"], parts["pad"]) == ((), ("<|im_end|>",), ("<|im_end|>",))
    parts = vocabulary("qwen").template
    assert (parts["bos"], parts["eos"], parts["pad"]) == ((), ("<|endoftext|>",), ("<|endoftext|>",))
    base = save(tmp_path / "base", tokenizer, LLAMA, eos_token="<|end_of_text|>")  # no chat model: texts end otherwise
    assert load_vocabulary(base).template["eos"] == ("<|end_of_text|>",)
    assert vocabulary("llama").template["eos"] == ("<|eot_id|>",)
    plain = load_vocabulary(save(tmp_path / "plain", byte_level(), ["<s>"], bos_token="<s>", eos_token="</s>"))
    assert plain.template == {"bos": ("<s>",), "eos": (), "pad": ()}
    assert (plain.pad_id, plain.eos_id) == (0, None)
    ids = plain.encode([(Segment(Special("bos")), Segment("a"), Segment(Special("eos")))])[0].ids
    assert ids.tolist() == [plain.special["<s>"], plain.id_of_bytes[b"a"]]


def test_chat_without_a_template_is_refused():
    with pytest.raises(InputError, match="no known chat template"):
        vocabulary("llama2").encode([(Segment(Special("header_open")),)])


def test_byte_vocabulary():
    gemma = vocabulary("gemma")
    ours = byte_vocabulary(gemma)
    assert ours.token_bytes[:256] == tuple(bytes([byte]) for byte in range(256))
    assert list(ours.special) == sorted(GEMMA) and list(ours.special.values()) == [256, 257, 258, 259, 260]
    assert (ours.size, ours.pad_id, ours.eos_id) == (261, ours.special["<pad>"], ours.special["<eos>"])
    longer = byte_vocabulary(gemma, [*sorted(GEMMA), "model", "user"])
    assert longer.part_ids("user") == [262] and longer.decode([262]) == "user"
    assert text_ids(longer, "user") == list(b"user")  # a word of the header is no token of text
    assert longer.template_special == ours.template_special
    mask = longer.boundary_mask(270)
    assert np.flatnonzero(mask).tolist() == [9, 10, 32, 256, 257, 258, 259, 260]


def test_control_of_another_vocabulary():
    qwen, llama = vocabulary("qwen"), vocabulary("llama")
    ours = with_special_tokens(qwen, llama)
    assert [ours.special[word] - qwen.size for word in LLAMA] == [0, 1, 2, 3, 4]
    assert text_ids(ours, "the <think>") == text_ids(qwen, "the <think>")
    assert ours.part_ids("end_of_turn") == [ours.special["<|eot_id|>"]]
    assert with_special_tokens(qwen, qwen).special == qwen.special
    marked = {i for i in np.flatnonzero(ours.boundary_mask(400)) if i in set(ours.special.values())}
    assert marked == {ours.special[word] for word in LLAMA}  # Qwen's own are not of this template


def test_boundary_mask_needs_room_for_what_can_be_written(tmp_path):
    ours = load_vocabulary(save(tmp_path / "t", byte_level(), [*GEMMA, "<image>"]))
    image = ours.special["<image>"]
    assert ours.boundary_mask(ours.size + 3).shape == (ours.size + 3,)
    assert not ours.boundary_mask(ours.size + 3)[image:].any()
    assert ours.boundary_mask(image).sum() == ours.boundary.sum()
    with pytest.raises(InputError, match="past the model's"):
        ours.boundary_mask(image - 1)
    for i, token in enumerate(ours.token_bytes):
        assert ours.boundary[i] == (token.startswith((b" ", b"\t", b"\n")) or (token == b"" and i != image))


def test_normalize():
    assert vocabulary("qwen").normalize("e\u0301") == "\u00e9"
    assert vocabulary("gemma").normalize("e\u0301 ") == "e\u0301 "  # writing spaces otherwise is no normalisation


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(InputError, match="missing.*does not exist"):
        load_vocabulary(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a tokenizer.json"):
        load_vocabulary(tmp_path)
    with pytest.raises(InputError, match="spell every text"):
        load_vocabulary(save(tmp_path / "characters", sentencepiece(False, byte_fallback=False), ["<s>"]))
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ā", "ÿ"})  # bytes 0 and 255, as SmolLM2 lacks some
    rare = load_vocabulary(save(tmp_path / "rare", byte_level(alphabet=alphabet), ["<s>"]))
    assert not rare.encode([(Segment("a\0"),)])[0].round_trips
    with pytest.raises(InputError, match="byte 0x61"):
        load_vocabulary(save(tmp_path / "gap", byte_level(text="b", alphabet=sorted(set(alphabet) - {"a"})), ["<s>"]))


def test_settings_of_a_tokenizer_file_that_would_change_rows_are_off(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    path = save(tmp_path / "t", tokenizer, LLAMA)
    assert json.loads((path / "tokenizer.json").read_text())["truncation"]
    assert load_vocabulary(path).encode([(Segment("zzzzzzzz"),)])[0].round_trips


def test_a_hole_before_a_control_token_is_named(tmp_path):
    folder = save(tmp_path / "holes", byte_level(), CHATML)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] += 7
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"tokenizer.json: the ids before .*im_end.* have holes"):
        load_vocabulary(folder)
