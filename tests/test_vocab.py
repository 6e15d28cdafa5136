"""Vocabularies: bytes of tokens, special tokens and templates, encoding."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, GEMMA, LLAMA, byte_level, save, sentencepiece, vocabulary
from tokenizers import pre_tokenizers

from minalm.errors import InputError
from minalm.text.documents import Markup, Segment, Special
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


def test_what_a_segment_is_written_as():
    piece = (
        Segment(Special("bos")),
        Segment(Markup(("<|start_header_id|>", "user"), ("<start_of_turn>", "user"))),
        Segment("the 1"),
        Segment(Markup((), ("<end_of_turn>",))),
        Segment(Special("eos")),
    )
    (ours,), (theirs,) = vocabulary("llama").encode([piece]), vocabulary("gemma").encode([piece], "teacher")
    names = {i: word for side in ("llama", "gemma") for word, i in vocabulary(side).special.items()}
    assert names[theirs.ids[-2]] == "<end_of_turn>" and theirs.ends[-2:].tolist() == [8, 9]
    assert ours.ends[-1] == 9 and ours.written.tolist() == [True, True, True, False, True]
    # "user" is read together with the text behind it, and none of its tokens ends before the Markup does.
    for kind, side in (("llama", "student"), ("gemma", "teacher")):
        (encoding,) = vocabulary(kind).encode([piece], side)
        assert encoding.round_trips and encoding.text_bytes.sum() == 5
        (whole,) = vocabulary(kind).encode([(Segment("x"), Segment("userthe 1"))])
        inner = encoding.ids[(encoding.segment == 1) | (encoding.segment == 2)].tolist()[1:]
        assert inner == text_ids(vocabulary(kind), "userthe 1")
        assert set(encoding.ends.tolist()) - {-1} <= set(range(1, 10))


def test_texts_side_by_side_are_one_text():
    for kind in ("llama", "gemma", "llama2", "metaspace", "qwen"):
        ours = vocabulary(kind)
        (apart,), (joined,) = (
            ours.encode([(Segment("th", False), Segment("e the"))]),
            ours.encode([(Segment("the the"),)]),
        )
        assert apart.ids.tolist() == joined.ids.tolist() and apart.round_trips
        assert apart.ends.tolist() == joined.ends.tolist()
        cut = apart.ends > 2  # a token that is in part of what counts does too
        assert (apart.loss_mask == cut).all() and cut.any()
        (apart,) = ours.encode([(Segment("the", False), Segment(" the"))])
        assert (
            apart.loss_mask.tolist()
            == [False] * (len(apart.ids) - apart.loss_mask.sum()) + [True] * apart.loss_mask.sum()
        )
        assert apart.loss_mask.any() and not apart.loss_mask.all()


def test_names_follow_tokenizer_config(tmp_path):
    tokenizer = byte_level()
    smollm = save(tmp_path / "s", tokenizer, CHATML, bos_token=CHATML[1], eos_token=CHATML[2], pad_token=CHATML[2])
    ours = load_vocabulary(smollm)  # its bos opens every message of a chat, and no text begins with it
    assert ours.names == {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert ours.chat_template.names["bos_token"] == CHATML[1] and ours.part_ids("bos") == []
    base = save(tmp_path / "base", tokenizer, LLAMA, eos_token="<|end_of_text|>")
    assert load_vocabulary(base).named("eos") == "<|end_of_text|>" and vocabulary("llama").named("eos") == "<|eot_id|>"
    plain = load_vocabulary(save(tmp_path / "plain", byte_level(), ["<s>"], bos_token="<s>"))
    assert plain.names == {"bos_token": "<s>"} and (plain.pad_id, plain.eos_id) == (0, None)
    ids = plain.encode([(Segment(Special("bos")), Segment("a"), Segment(Special("eos")))])[0].ids
    assert ids.tolist() == [plain.special["<s>"], plain.id_of_bytes[b"a"]]


def test_byte_vocabulary():
    gemma = vocabulary("gemma")
    ours = byte_vocabulary(gemma)
    assert ours.token_bytes[:256] == tuple(bytes([byte]) for byte in range(256))
    assert list(ours.special) == sorted(GEMMA) and list(ours.special.values()) == [256, 257, 258, 259, 260]
    assert (ours.size, ours.pad_id, ours.eos_id) == (261, ours.special["<pad>"], ours.special["<eos>"])
    longer = byte_vocabulary(gemma, [*sorted(GEMMA), "model", "user"])
    assert longer.special["user"] == 262 and longer.decode([262]) == "user"
    assert text_ids(longer, "user") == list(b"user")  # a word of the header is no token of text
    assert longer.template_special == ours.template_special
    mask = longer.boundary_mask(270)
    assert np.flatnonzero(mask).tolist() == [9, 10, 32, 256, 257, 258, 259, 260]


def test_control_of_another_vocabulary():
    qwen, llama = vocabulary("qwen"), vocabulary("llama")
    ours = with_special_tokens(qwen, llama)
    assert [ours.special[word] - qwen.size for word in LLAMA] == [0, 1, 2, 3, 4]
    assert text_ids(ours, "the <think>") == text_ids(qwen, "the <think>")
    assert ours.chat_template == llama.chat_template and ours.named("eos") == "<|eot_id|>"
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


def test_a_hole_before_a_special_token(tmp_path):
    folder = save(tmp_path / "holes", byte_level(), CHATML)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] += 7
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_vocabulary(folder)
    assert ours.special["<|im_end|>"] == ours.special["<|im_start|>"] + 8 == ours.size - 1
