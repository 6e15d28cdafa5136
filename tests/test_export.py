"""What convert.py writes, loaded by transformers as users do, and what it reads of the published byte models.

The fixtures' tiny models get small tokenizers and chat templates of their families. What transformers computes of an
exported folder is compared with what we compute of it, and with lookups in plain Python.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import small_tokenizers as small
from decoding import greedy
from real_tokenizers import real_tokenizer
from test_convert import compute
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import convert
from minalm.huggingface import weights
from minalm.huggingface.folder import load_vocabularies
from minalm.models import transformer
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer
from minalm.parallel.mesh import make_mesh
from minalm.text.documents import Segment, Special
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.suffixes import LongestSuffix, longest_suffix
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import Vocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
# transformers 5 renamed an argument, and warns of the old name.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
PADDED = 3  # rows of a teacher's tables past its tokenizer
# Fixture -> kind of its tokenizer, and what ends an answer.
TEACHERS = {
    "llama3": ("llama", "<|eot_id|>"),
    "mistral": ("mistral3", "</s>"),
    "qwen2": ("qwen", "<|im_end|>"),
    "qwen3": ("qwen", "<|im_end|>"),
    "gemma2": ("gemma", "<end_of_turn>"),
    "gemma3": ("gemma", "<end_of_turn>"),
    "olmo2": ("olmo2", "<|endoftext|>"),
    "olmo3": ("olmo3", "<|endoftext|>"),
}
# What a template adds where an answer is asked for.
ASKED = {
    "llama": "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
    "mistral3": "",
    "qwen": "<|im_start|>assistant\\n",
    "gemma": "<start_of_turn>model\\n",
    "olmo2": "<|assistant|>\\n",
    "olmo3": "<|im_start|>assistant\\n",
}
STUDENTS = [(name, True) for name in TEACHERS] + [(name, False) for name in ("llama3", "gemma2", "gemma3", "qwen3")]
IN_SHORT = (("llama3", True), ("gemma2", True), ("olmo3", True), ("gemma3", False))  # the others are slow
each_student = pytest.mark.parametrize(
    "name, expansion",
    [student if student in IN_SHORT else pytest.param(*student, marks=pytest.mark.slow) for student in STUDENTS],
    ids=lambda value: str(value),
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "Answer the user."}
TURNS = [
    user("hello there, the user said é 日本語\n\n  to the\tmodel"),
    {"role": "assistant", "content": "of it, all 日 the rest."},
    user("and the end of the world"),
]


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory):
    """transformers keeps the code of folders that it has run: not in the user's cache here.

    One thread: with more, models as small as these spend their time waiting for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_MODULES_CACHE", modules)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)  # it may be imported already
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time: XLA leaves out most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()


def with_tables(name: str, rows: int, loud: list[int]) -> Transformer:
    """A fixture's model with tables of `rows` rows. Rows `loud` are longer: these tokens are often the likeliest.

    The last norm turns most channels around: else such tokens would repeat themselves for ever.
    """
    model = weights.load(FIXTURES / name, np.float32)
    arrays, random = transformer.leaves(model), np.random.default_rng(3)
    scale = np.ones((rows, 1), np.float32)
    scale[loud] = 2
    for table in ("embed", "unembed"):
        if table in arrays:
            size = rows, model.config.embed
            arrays[table] = scale * random.normal(0, model.config.embed**-0.5, size).astype(np.float32)
    arrays["norm"] = random.normal(-0.3 - model.config.norm_plus_one, 1, model.config.embed).astype(np.float32)
    return transformer.from_leaves(dataclasses.replace(model.config, vocab_size=rows), arrays)


def write_teacher(folder: Path, name: str) -> Vocabulary:
    """A teacher's folder: the fixture's architecture and layers, with a small tokenizer and a chat template."""
    kind, end = TEACHERS[name]
    asked = f"{{%- if add_generation_prompt -%}}{{{{- '{ASKED[kind]}' -}}}}{{%- endif -%}}"
    vocabulary = small.make(kind, folder.with_name(f"{folder.name}-tokenizer"), small.CHATS[kind] + asked)
    files = {file.name: file.read_bytes() for file in folder.with_name(f"{folder.name}-tokenizer").iterdir()}
    files["generation_config.json"] = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    loud = [vocabulary.special[word] for word in vocabulary.template_special]
    model = with_tables(name, vocabulary.size + PADDED, loud)
    keys = {"max_position_embeddings": 640, "eos_token_id": vocabulary.special[end]}
    weights.save(folder, model, "float32", keys=keys, files=files)
    return vocabulary


def chat(vocabulary: Vocabulary, messages: list[dict[str, str]], asked: bool) -> list[int]:
    """The ids of a chat as it is trained on; `asked`: with the header of an answer."""
    read = ChatReader(vocabulary, vocabulary, False, "2026-01-01")
    return vocabulary.encode([read({"messages": messages}, add_generation_prompt=asked)])[0].ids.tolist()


@dataclass(frozen=True)
class Exported:
    folder: Path
    original: Vocabulary  # the teacher's
    tokenizer: object
    model: object  # of transformers
    ours: Transformer
    vocabulary: Vocabulary
    suffixes: LongestSuffix | None
    chat: list[dict[str, str]]
    asked: bool  # whether the template writes something where an answer is asked for
    end: str

    def logits(self, ids: list[int]) -> np.ndarray:
        """Ours, [time, vocab]."""
        row = np.array([ids], np.int32)
        return compute(self.ours, row, None if self.suffixes is None else self.suffixes(row))[0]

    def theirs(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()

    def generate(self, prompts: list[list[int]], new: int, stop: int | None) -> list[list[int]]:
        rows = self.vocabulary.size
        entries = VocabularyMask(np.ones(rows, bool), self.vocabulary.boundary_mask(rows))
        mesh = make_mesh(1, 1)
        prompts = [np.array(prompt, np.int32) for prompt in prompts]
        return greedy(self.ours, entries, self.suffixes, prompts, new, mesh, () if stop is None else (stop,))


def load(folder: Path, trust: bool) -> tuple[object, object]:
    """As on the model cards: the tokenizer needs no code, the model does if it has an expansion."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    code = {"trust_remote_code": True} if trust else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **code)
    assert not any(info.values()), info  # no tensor is missing, left over, or of another shape
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str, bool], Exported]:
    @cache
    def get(name: str, expansion: bool) -> Exported:
        folder = tmp_path_factory.mktemp(name)
        original = write_teacher(folder / "teacher", name)
        flags = [] if expansion else ["--no-expansion"]
        run("bytes", folder / "teacher", folder / "out", "--dtype", "float32", *flags)
        ours, (vocabulary, suffixes) = weights.load(folder / "out", np.float32), load_vocabularies(folder / "out")
        kind, end = TEACHERS[name]
        messages = ([] if kind in ("gemma", "mistral3") else [SYSTEM]) + TURNS  # these two refuse one
        asked = ASKED[kind] != ""
        both = load(folder / "out", trust=expansion)
        return Exported(folder / "out", original, *both, ours, vocabulary, suffixes, messages, asked, end)

    return get


def render(student: Exported, messages: list[dict[str, str]]) -> dict:
    return student.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


# --- byte students --------------------------------------------------------------------------------------------------


@each_student
def test_a_chat_has_the_ids_that_we_train_on(exported, name, expansion):
    student = exported(name, expansion)
    for messages in (student.chat, student.chat[:-2]):
        found = render(student, messages)
        expected = chat(student.vocabulary, messages, student.asked)
        assert found["input_ids"].tolist() == [expected]
        assert found["attention_mask"].all() and set(found) == {"input_ids", "attention_mask"}
        assert max(expected) >= 256
    bos = student.vocabulary.part_ids("bos") if student.original.adds_bos else []
    assert student.tokenizer(" é\n").input_ids == [*bos, *" é\n".encode()]
    assert student.tokenizer.decode([*bos, *" é\n".encode()], skip_special_tokens=True) == " é\n"


@each_student
def test_logits_in_one_pass_and_step_by_step(exported, name, expansion):
    student = exported(name, expansion)
    ids = render(student, student.chat)["input_ids"][0].tolist()
    expected = student.logits(ids)
    assert expected.std() > 0.3 and expected.shape == (len(ids), student.vocabulary.size)
    np.testing.assert_allclose(student.theirs(ids), expected, rtol=0, atol=1e-4)
    start, outputs, pieces = 0, None, []
    for size in (len(ids) - 20, *[1] * 12, 8):
        with torch.no_grad():
            past = {} if outputs is None else {CACHE: outputs[CACHE]}
            outputs = student.model(torch.tensor([ids[start : start + size]]), use_cache=True, **past)
        pieces.append(outputs.logits[0].numpy())
        start += size
    np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=0, atol=1e-4)
    if expansion:
        without = compute(student.ours, np.array([ids], np.int32), np.zeros((1, len(ids)), np.int32))[0]
        assert np.abs(without - expected).max() > 0.1  # so it matters


@each_student
def test_a_padded_batch_is_its_rows_one_by_one(exported, name, expansion):
    student = exported(name, expansion)
    messages = [student.chat[:-2], student.chat, [*student.chat[:-3], user("the")]]
    rows = [chat(student.vocabulary, each, student.asked) for each in messages]
    assert len(set(map(len, rows))) == 3
    if student.tokenizer.pad_token is None:  # Mistral's has none, and its users choose one
        student.tokenizer.pad_token = student.end
    inputs = student.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    assert [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)] == rows
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][:, 0].all()
    with torch.no_grad():
        logits = student.model(**inputs).logits.numpy()
    for found, row in zip(logits, rows, strict=True):
        np.testing.assert_allclose(found[-len(row) :], student.theirs(row), rtol=0, atol=1e-4)
    new = 8
    batch = student.model.generate(
        **inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, return_dict_in_generate=True
    )
    for found, row in zip(batch.sequences[:, -new:].tolist(), rows, strict=True):
        one = student.model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=new, min_new_tokens=new)
        assert found == one[0, -new:].tolist()


@each_student
def test_generation_is_ours(exported, name, expansion):
    """With special tokens among what is generated, and up to one that ends it."""
    student = exported(name, expansion)
    asked = [student.chat, student.chat[:-2], [*student.chat[:-3], user("日 all")]]
    inputs = [render(student, messages) for messages in asked]
    prompts, new = [each["input_ids"][0].tolist() for each in inputs], 16
    expected = student.generate(prompts, new, stop=None)
    for given, prompt, ids in zip(inputs, prompts, expected, strict=True):
        # The folder's generation_config.json names ids that stop: here none does.
        never = next(i for i in range(256) if i not in ids)
        found = student.model.generate(**given, eos_token_id=never, do_sample=False, max_new_tokens=new)
        assert found[0].tolist() == prompt + ids
    assert len(set(sum(expected, []))) > 4
    assert any(before >= 256 > after for ids in expected for before, after in zip(ids, ids[1:]))  # goes on after one

    stop = next(i for ids in expected for i in ids[3:] if i >= 256)
    stopped = student.generate(prompts, new, stop=stop)
    assert stopped == [ids[: ids.index(stop)] if stop in ids else ids for ids in expected] != expected
    for given, prompt, ids in zip(inputs, prompts, stopped, strict=True):
        for each in (given, {"inputs": given["input_ids"]}):  # the bare tensor too
            found = student.model.generate(**each, eos_token_id=stop, do_sample=False, max_new_tokens=new)
            assert found[0].tolist() == [*prompt, *ids, *([stop] if len(ids) < new else [])]


@each_student
def test_generation_stops_where_an_answer_ends(exported, name, expansion):
    """As on the model cards, and by the folder's own settings."""
    student = exported(name, expansion)
    end = student.tokenizer.convert_tokens_to_ids(student.end)
    assert end == student.vocabulary.special[student.end] and end in student.vocabulary.stop_ids
    settings = student.model.generation_config
    stops = set(settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id])
    assert end in stops and settings.temperature == 0.7 and settings.do_sample and settings.top_k == 5
    inputs = render(student, student.chat)
    prompt = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    for stop, given in (({end}, {"eos_token_id": end}), (stops, {})):
        found = student.model.generate(
            **inputs, **given, top_k=0, temperature=1.0, max_new_tokens=60, num_return_sequences=16, pad_token_id=0
        )
        ended = 0
        for ids in found[:, prompt:].tolist():
            first = next((place for place, i in enumerate(ids) if i in stop), len(ids))
            assert not any(ids[first + 1 :])  # padding
            ended += first < len(ids)
        assert ended


@each_student
def test_a_folder_holds_what_it_needs_and_no_more(exported, name, expansion):
    student = exported(name, expansion)
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in student.folder.iterdir()} == expected | (
        {"modeling_minalm.py"} if expansion else set()
    )
    values = json.loads((student.folder / "config.json").read_text())
    assert ("auto_map" in values) == expansion
    assert values["model_type"].startswith("tpu_") == expansion
    settings = json.loads((student.folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (student.folder.parent / "teacher" / "chat_template.jinja").read_text()
    dtypes = {tensor.dtype for tensor in load_file(student.folder / "model.safetensors").values()}
    assert dtypes == {torch.float32}


@each_student
def test_we_read_the_folder_back(exported, tmp_path, name, expansion):
    """To the same tables, and the map that the teacher's tokenizer gives; exported again, it is the same files."""
    student = exported(name, expansion)
    teacher = weights.load(student.folder.parent / "teacher", np.float32)
    found = transformer.leaves(student.ours)
    for leaf, array in transformer.leaves(teacher).items():
        if leaf not in ("embed", "unembed"):
            assert np.array_equal(found[leaf], array), leaf
    settings = {"vocab_size": student.vocabulary.size, "tied": False}
    settings["expansion_size"] = teacher.config.vocab_size if expansion else None
    assert student.ours.config == dataclasses.replace(teacher.config, **settings)
    if expansion:
        assert np.array_equal(student.ours.expansion, teacher.embed)
        random = np.random.default_rng(0)
        rows = random.choice(list("the user model日".encode()) + [256, 257], (4, 200)).astype(np.int32)
        expected = longest_suffix(student.original, student.vocabulary)
        assert np.array_equal(student.suffixes(rows), expected(rows)) and len(set(expected(rows).ravel())) > 20
    else:
        assert student.suffixes is None
    run("export", student.folder, tmp_path / "again", "--dtype", "float32")
    for file in student.folder.iterdir():
        if file.suffix == ".json" and file.name != "tokenizer.json":
            old, new = (json.loads((folder / file.name).read_text()) for folder in (student.folder, tmp_path / "again"))
            assert new == old, file.name
        else:
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


# --- students on another tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ("keep", "change"))
@pytest.mark.parametrize("tied", (True, False))
def test_a_student_on_another_tokenizer(tmp_path, special, tied):
    """Llama onto Qwen's kind of BPE: plain transformers, no code. --control is the older name of the flag."""
    original = write_teacher(tmp_path / "teacher", "llama3")
    write_teacher(tmp_path / "other", "qwen3")
    flags = ["--special-tokens" if tied else "--control", special, "--tied", tied, "--dtype", "float32"]
    run("tokenizer", tmp_path / "teacher", tmp_path / "other-tokenizer", tmp_path / "out", *flags)
    tokenizer, model = load(tmp_path / "out", trust=False)
    vocabulary, suffixes = load_vocabularies(tmp_path / "out")
    assert suffixes is None and vocabulary.tokenizer is not None
    assert set(small.CHATML) <= set(vocabulary.special)
    assert (set(small.LLAMA) <= set(vocabulary.special)) == (special == "keep")
    assert (vocabulary.chat_template.sources == original.chat_template.sources) == (special == "keep")
    messages = [SYSTEM, *TURNS]
    ids = np.array(chat(vocabulary, messages, asked=True), np.int32)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if special == "change":
        assert inputs["input_ids"].tolist() == [ids.tolist()]
    else:  # transformers cuts "\n\n" and the text after it as GPT-2 does, we on their own: the same text at least
        theirs = [tokenizer.decode(each, skip_special_tokens=False) for each in (inputs["input_ids"][0], ids)]
        assert theirs[0] == theirs[1]
        inputs = {"input_ids": torch.tensor(ids[None].astype(np.int64))}
    ours = weights.load(tmp_path / "out", np.float32)
    assert ours.config.tied == tied == (ours.unembed is None)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    assert expected.std() > 0.3 and expected.shape[-1] == vocabulary.size
    np.testing.assert_allclose(compute(ours, ids[None], None), expected, rtol=0, atol=1e-4)
    end = "<|eot_id|>" if special == "keep" else "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(end) in np.atleast_1d(model.generation_config.eos_token_id)


# --- the published byte models --------------------------------------------------------------------------------------

# Their special lists are longer: words of the headers have ids as well, as added tokens that are not special.
PUBLISHED = {
    "gemma2": (
        "gemma",
        "gemma2_untied",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("user", "model", "\n"),
    ),
    "llama": (
        "llama",
        "llama3",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        ("system", "user", "assistant", "\n\n"),
    ),
}
LONG = ["abcdefghijklmnopqrstuvwxyz", "9876543210abcdefghij"]  # more than 16 bytes


@dataclass(frozen=True)
class Published:
    folder: Path
    original: Vocabulary
    ids: dict[str, int]  # of the special tokens and words
    keys: dict[str, int]  # the map
    plain: object  # the family's own class in transformers, with the tensors but the expansion's
    table: object  # the expansion's


def spelled(token: bytes, words: dict[str, int]) -> list[int]:
    """Ids of a token's bytes; a word in it has its own id. As in published maps: at each place the longest word."""
    ids, place = [], 0
    while place < len(token):
        found = [word for word in words if token.startswith(word.encode(), place)]
        word = max(found, key=len, default="")
        ids.append(words[word] if found else token[place])
        place += max(1, len(word.encode()))
    return ids


def write_published(folder: Path, family: str, **settings: object) -> Published:
    """A small folder in exactly the layout of the published byte models, made by plain code."""
    kind, fixture, special, words = PUBLISHED[family]
    source = folder.with_name("source")
    tokenizer = small.sentencepiece(False) if kind == "gemma" else small.byte_level()
    config = {"bos_token": special[2 if kind == "gemma" else 0], "pad_token": special[0 if kind == "gemma" else 4]}
    config["eos_token"] = special[1] if kind == "gemma" else special[3]
    original = load_vocabulary(small.save(source, tokenizer, special, LONG, **config))
    ids = {word: 256 + number for number, word in enumerate([*sorted(special), *words])}

    keys = {"": -1}
    for i, token in enumerate(original.token_bytes):
        names = [word for word in special if original.special[word] == i]
        if names:
            row = [ids[names[0]]]
        elif token.decode(errors="replace") in words:
            row = [ids[token.decode()]]
        elif token:
            row = spelled(token, {word: ids[word] for word in words})
        else:
            continue
        keys.setdefault(",".join(str(i + 1) for i in row[::-1][:16]), i + 1)

    # The tokenizer: bytes in GPT-2's alphabet, then the added tokens.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(shown)))
    bytes_only = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    for word in ids:
        bytes_only.add_tokens([AddedToken(word, special=word in special, normalized=False)])
    assert bytes_only.get_vocab()["user"] == ids["user"]
    folder.mkdir()
    bytes_only.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))

    values = json.loads((FIXTURES / fixture / "config.json").read_text())
    rows = 256 + len(ids)
    values |= {"vocab_size": rows, "tie_word_embeddings": False, "dtype": "float32", "eos_token_id": ids[special[-1]]}
    torch.manual_seed(5)
    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        layers = load_file(FIXTURES / fixture / "model.safetensors")
        plain.load_state_dict({k: v for k, v in layers.items() if "embed" not in k and "head" not in k}, strict=False)
        for table in (plain.model.embed_tokens.weight, plain.lm_head.weight):
            table.copy_(torch.randn(table.shape) / table.shape[1] ** 0.5)
    table = torch.randn(original.size, 24) / 24**0.5
    tensors = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    save_file({**tensors, "model.expand_embed_tokens.weight": table}, folder / "model.safetensors")
    name = values["architectures"][0].removesuffix("ForCausalLM")
    values |= {
        "architectures": [f"TPU{name}ForCausalLM"],
        "model_type": f"tpu_{family}",
        "auto_map": {
            "AutoConfig": f"configuration_tpu_{family}.TPU{name}Config",
            "AutoModelForCausalLM": f"modelling_tpu_{family}.TPU{name}ForCausalLM",
        },
        "expand_input_ids": True,
        "expand_input_ids_maxlen": 16,
        "expand_input_ids_vocab_size": original.size,
        "expand_input_ids_dict": [keys, [ids[word] for word in special]],
        "skip_out_norm": False,
        **({"add_qk_norm": False} if family == "llama" else {}),
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(values))
    for stem in (f"configuration_tpu_{family}", f"modelling_tpu_{family}"):
        (folder / f"{stem}.py").write_text("raise SystemError('the code of others was run')\n")
    return Published(folder, original, ids, keys, plain, table)


def plain_logits(published: Published, ids: list[int]) -> np.ndarray:
    """The family's own model, given sums of embeddings that a plain loop looks up."""
    found = []
    for end in range(1, len(ids) + 1):
        rows = (ids[start:end] for start in range(max(0, end - 16), end))
        names = (",".join(str(i + 1) for i in reversed(row)) for row in rows)
        found.append(next((published.keys[name] - 1 for name in names if name in published.keys), 0))
    model = published.plain
    # Through the model's own table, so that Gemma's factor is where its class puts it.
    kept = model.model.embed_tokens.weight.data
    model.model.embed_tokens.weight.data = kept[ids] + published.table[found]
    with torch.no_grad():
        logits = model(torch.arange(len(ids))[None], use_cache=False).logits[0].numpy()
    model.model.embed_tokens.weight.data = kept
    return logits


@pytest.fixture(scope="module", params=PUBLISHED)
def published(tmp_path_factory, request) -> Published:
    return write_published(tmp_path_factory.mktemp(request.param) / "published", request.param)


def test_words_of_the_headers_never_come_out_of_text(published):
    vocabulary, suffixes = load_vocabularies(published.folder)
    assert vocabulary.tokenizer is None and dict(vocabulary.special) == published.ids
    text = "the user said to the model: assistant, system\n\nuser <bos> <|eot_id|>"
    ids = vocabulary.encode([(Segment(Special("bos")), Segment(text))])[0].ids
    assert ids[-len(text) :].tolist() == list(text.encode()) and len(ids) == len(text) + 1
    header = chat(vocabulary, [user("user")], asked=False)
    start, stop = header.index(published.ids["user"]), header.index(ord("u"))
    assert header[stop : stop + 4] == list(b"user") and start < stop
    assert header.count(published.ids["user"]) == 1
    assert suffixes.unread  # tokens that hold such words


def test_a_published_model_computes_what_it_did(published):
    ours, (vocabulary, suffixes) = weights.load(published.folder, np.float32), load_vocabularies(published.folder)
    text = "xyz abcdefghijklmnopqrstuvwxyz the user said é日本 to the model\n\n\tthere"
    ids = np.array(chat(vocabulary, [user(text)], asked=True), np.int32)
    expected = plain_logits(published, ids.tolist())
    assert (
        expected.std() > 0.3
        and np.isin([original - 1 for original in published.keys.values()], suffixes(ids[None])).sum() > 20
    )
    np.testing.assert_allclose(compute(ours, ids[None], suffixes(ids[None]))[0], expected, rtol=0, atol=1e-4)
    # A token of more than 16 bytes is found by its last 16.
    [long] = [i for i, token in enumerate(published.original.token_bytes) if token == LONG[0].encode()]
    assert (
        long in suffixes(ids[None])
        and published.keys[",".join(str(b + 1) for b in LONG[0].encode()[::-1][:16])] == long + 1
    )

    rows, mesh = vocabulary.size, make_mesh(1, 1)
    entries = VocabularyMask(np.ones(rows, bool), vocabulary.boundary_mask(rows))
    [found] = greedy(ours, entries, suffixes, [ids], 12, mesh)
    for number in range(12):
        assert plain_logits(published, [*ids.tolist(), *found[:number]])[-1].argmax() == found[number]


def test_a_published_model_is_inspected(published, capsys):
    run("inspect", published.folder)
    printed = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    assert printed["expansion_size"] == str(published.original.size) and printed["tied"] == "False"
    assert printed["vocabulary"].startswith(f"{256 + len(published.ids)} ids, bytes; special tokens <")
    assert int(printed["expansion"].split()[0]) > 250


def test_a_published_model_is_exported_and_runs_in_transformers(published, tmp_path):
    run("export", published.folder, tmp_path / "out", "--dtype", "float32")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("config.json", "model.safetensors", "modeling_minalm.py", "tokenizer.json", "tokenizer_config.json")
    }
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (published.folder / file).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (published.folder, tmp_path / "out"))
    assert new["expand_input_ids_dict"] == old["expand_input_ids_dict"]
    assert new["eos_token_id"] == old["eos_token_id"]
    assert new["max_position_embeddings"] == old["max_position_embeddings"]
    assert set(new["auto_map"].values()) == {f"modeling_minalm.{a.split('.')[1]}" for a in old["auto_map"].values()}
    assert weights.read_config(tmp_path / "out" / "config.json") == weights.read_config(
        published.folder / "config.json"
    )
    old, new = (load_file(folder / "model.safetensors") for folder in (published.folder, tmp_path / "out"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    _, model = load(tmp_path / "out", trust=True)
    vocabulary, _ = load_vocabularies(tmp_path / "out")
    ids = chat(vocabulary, [user("the user said é日本 to the model\n\n there")], asked=True)
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, plain_logits(published, ids), rtol=0, atol=1e-4)


def test_a_published_llama_with_norms_of_queries_and_keys(tmp_path):
    """Its own code's `add_qk_norm` is what Qwen 3 has, and so it is exported."""
    published = write_published(tmp_path / "published", "llama", add_qk_norm=True)
    held = load_file(published.folder / "model.safetensors")
    for layer in range(3):
        for norm in ("q_norm", "k_norm"):
            held[f"model.layers.{layer}.self_attn.{norm}.weight"] = 1 + 0.5 * torch.randn(10)
    save_file(held, published.folder / "model.safetensors")
    values = json.loads((published.folder / "config.json").read_text()) | {"model_type": "qwen3"}
    del values["auto_map"]
    config = transformers.AutoConfig.for_model(**values)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing = plain.load_state_dict(held, strict=False)
    assert missing.unexpected_keys == ["model.expand_embed_tokens.weight"] and not missing.missing_keys
    vocabulary, suffixes = load_vocabularies(published.folder)
    ids = np.array(chat(vocabulary, [user("the user said é日本 to the model")], asked=True), np.int32)
    expected = plain_logits(dataclasses.replace(published, plain=plain), ids.tolist())
    assert np.abs(expected - plain_logits(published, ids.tolist())).max() > 0.1  # without these norms
    found = compute(weights.load(published.folder, np.float32), ids[None], suffixes(ids[None]))[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    run("export", published.folder, tmp_path / "out", "--dtype", "float32")
    _, model = load(tmp_path / "out", trust=True)
    with torch.no_grad():
        found = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("verb", ("export", "inspect"))
def test_other_layouts_of_published_models_are_refused(tmp_path, verb):
    for number, settings in enumerate(({"skip_out_norm": True}, {"expand_input_ids_maxlen": 8})):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_published(folder / "model", "llama", **settings)
        with pytest.raises(SystemExit) as exit:
            run(verb, folder / "model", *([folder / "out"] if verb == "export" else []))
        [key] = settings
        assert exit.value.code.startswith("error: ") and key in exit.value.code and exit.value.code.count(": ") <= 3
        assert not (folder / "out").exists()


# --- models as they are ---------------------------------------------------------------------------------------------

TEXTS = [text["text"] for text in json.loads((Path(__file__).parent / "golden" / "align.json").read_text())["texts"]]
FIXTURE_KINDS = TEACHERS | {
    name: TEACHERS[name.split("_")[0]] for name in ("gemma2_untied", "llama3_tied", "qwen2_yarn")
}


def tensors(folder: Path) -> dict[str, object]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float16"))
@pytest.mark.parametrize("name", FIXTURE_KINDS)
def test_an_untouched_model_stays_as_it_is(tmp_path, name, dtype):
    source = tmp_path / "source"
    kind, _ = FIXTURE_KINDS[name]
    vocabulary = small.make(kind, source, small.CHATS[kind])
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.3}))
    (source / "modeling_other.py").write_text("raise SystemError\n")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    values = json.loads((FIXTURES / name / "config.json").read_text())
    rows = vocabulary.size + PADDED
    values |= {"vocab_size": rows, "dtype": dtype, "eos_token_id": [2, 5], "max_position_embeddings": 321}
    held = tensors(FIXTURES / name)
    torch.manual_seed(0)
    for table in {"model.embed_tokens.weight", "lm_head.weight"} & held.keys():
        held[table] = torch.randn(rows, 24)
    held = {name: tensor.to(getattr(torch, dtype)) for name, tensor in held.items()}
    save_file(held, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(values))

    run("export", source, tmp_path / "out", *([] if dtype == "bfloat16" else ["--dtype", "float32"]))
    written = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # which holds every float16
    found = tensors(tmp_path / "out")
    assert found.keys() == held.keys() and {tensor.dtype for tensor in found.values()} == {written}
    assert all(torch.equal(found[name], held[name].to(written)) for name in held)
    assert weights.read_config(tmp_path / "out" / "config.json") == weights.read_config(source / "config.json")
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings", "model_type"):
        assert new[key] == values[key], key
    assert new["architectures"] == values["architectures"] and "auto_map" not in new
    assert not (tmp_path / "out" / "pytorch_model.bin").exists() and not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()

    again = load_vocabularies(tmp_path / "out")[0]
    assert (again.special, again.names, again.token_bytes) == (
        *(vocabulary.special, vocabulary.names, vocabulary.token_bytes),
    )
    pieces = [(Segment(Special("bos")), Segment(text), Segment(Special("eos"))) for text in TEXTS]
    assert all(map(np.array_equal, *([e.ids for e in v.encode(pieces)] for v in (again, vocabulary))))
    if dtype == "float32":  # transformers computes the same of both
        both = [
            transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out")
        ]
        with torch.no_grad():
            old, new = (model(torch.arange(40)[None]).logits for model in both)
        assert old.std() > 0.1 and torch.equal(old, new)


@pytest.mark.real
@pytest.mark.parametrize(
    "tokenizer, name", (("gemma2", "gemma2"), ("gemma3", "gemma3"), ("llama3", "llama3_tied"), ("qwen3", "qwen3"))
)
def test_real_tokenizers_stay_as_they_are(tmp_path, tokenizer, name):
    vocabulary = load_vocabulary(real_tokenizer(tokenizer))
    files = {file.name: file.read_bytes() for file in real_tokenizer(tokenizer).iterdir()}
    weights.save(tmp_path / "source", with_tables(name, vocabulary.size + PADDED, []), "bfloat16", files=files)
    run("export", tmp_path / "source", tmp_path / "out")
    old, new = (tensors(folder) for folder in (tmp_path / "source", tmp_path / "out"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    again = load_vocabularies(tmp_path / "out")[0]
    pieces = [(Segment(Special("bos")), Segment(text), Segment(Special("eos"))) for text in TEXTS]
    assert all(map(np.array_equal, *([e.ids for e in v.encode(pieces)] for v in (again, vocabulary))))
    theirs = [
        transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for folder in (tmp_path / "source", tmp_path / "out")
    ]
    assert theirs[0](TEXTS).input_ids == theirs[1](TEXTS).input_ids
