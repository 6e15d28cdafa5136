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
import jax.numpy as jnp
import numpy as np
import pytest
import small_tokenizers as small
from test_convert import compute

import convert
from minalm import families, hf
from minalm.generate import generate
from minalm.head import Entries
from minalm.model import Transformer
from minalm.ngrams import LongestSuffix, longest_suffix
from minalm.sharding import make_mesh, place
from minalm.student import load_vocabularies
from minalm.text import Control, Segment, end_of
from minalm.vocab import Vocabulary, load_vocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
FLOAT32 = jnp.dtype(jnp.float32)
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
each_student = pytest.mark.parametrize("name, expansion", STUDENTS, ids=lambda value: str(value))


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
    """A fixture's model with tables of `rows` rows; the rows `loud` are longer, so that these tokens are often likeliest.

    The last norm turns most channels around: else such tokens would repeat themselves for ever.
    """
    model = hf.load(FIXTURES / name, np.float32)
    arrays, random = families.leaves(model), np.random.default_rng(3)
    scale = np.ones((rows, 1), np.float32)
    scale[loud] = 2
    for table in ("embed", "unembed"):
        if table in arrays:
            size = rows, model.config.embed
            arrays[table] = scale * random.normal(0, model.config.embed**-0.5, size).astype(np.float32)
    arrays["norm"] = random.normal(-0.3 - model.config.norm_plus_one, 1, model.config.embed).astype(np.float32)
    return families.from_leaves(dataclasses.replace(model.config, vocab_size=rows), arrays)


def write_teacher(folder: Path, name: str) -> Vocabulary:
    """A teacher's folder: the fixture's architecture and layers, with a small tokenizer and a chat template."""
    kind, end = TEACHERS[name]
    asked = f"{{%- if add_generation_prompt -%}}{{{{- '{ASKED[kind]}' -}}}}{{%- endif -%}}"
    vocabulary = small.make(kind, folder.with_name(f"{folder.name}-tokenizer"), small.CHATS[kind] + asked)
    files = {file.name: file.read_bytes() for file in folder.with_name(f"{folder.name}-tokenizer").iterdir()}
    files["generation_config.json"] = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    loud = [vocabulary.control[word] for word in vocabulary.template_control]
    model = with_tables(name, vocabulary.size + PADDED, loud)
    keys = {"max_position_embeddings": 640, "eos_token_id": vocabulary.control[end]}
    hf.save(folder, model, "float32", keys=keys, files=files)
    return vocabulary


def chat(messages: list[dict[str, str]], asked: bool) -> tuple[Segment, ...]:
    """As text.py reads it; `asked`: with the header of an answer."""
    piece = [Segment(Control("start_of_chat"))]
    for number, message in enumerate(messages, start=1):
        piece += [Segment(Control(part)) for part in ("header_open", message["role"], "header_close")]
        piece += [Segment(message["content"]), Segment(end_of(message["role"], number == len(messages)))]
    answer = [Segment(Control(part)) for part in ("header_open", "assistant", "header_close")]
    return tuple(piece + answer * asked)


@dataclass(frozen=True)
class Exported:
    folder: Path
    original: Vocabulary  # the teacher's
    tokenizer: object
    model: object  # of transformers
    ours: Transformer
    vocabulary: Vocabulary
    ngrams: LongestSuffix | None
    chat: list[dict[str, str]]
    asked: bool  # whether the template writes something where an answer is asked for
    end: str

    def logits(self, ids: list[int]) -> np.ndarray:
        """Ours, [time, vocab]."""
        row = np.array([ids], np.int32)
        return compute(self.ours, row, None if self.ngrams is None else self.ngrams(row))[0]

    def theirs(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()

    def generate(self, prompts: list[list[int]], new: int, stop: int | None) -> list[list[int]]:
        rows = self.vocabulary.size
        entries = Entries(np.ones(rows, bool), self.vocabulary.boundary_mask(rows))
        mesh = make_mesh(1, 1)
        prompts = [np.array(prompt, np.int32) for prompt in prompts]
        return generate(place(self.ours, mesh), place(entries, mesh), self.ngrams, prompts, new, stop, mesh, FLOAT32)


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
        ours, (vocabulary, ngrams) = hf.load(folder / "out", np.float32), load_vocabularies(folder / "out")
        kind, end = TEACHERS[name]
        messages = ([] if kind in ("gemma", "mistral3") else [SYSTEM]) + TURNS  # these two refuse one
        asked = ASKED[kind] != ""
        both = load(folder / "out", trust=expansion)
        return Exported(folder / "out", original, *both, ours, vocabulary, ngrams, messages, asked, end)

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
        expected = student.vocabulary.encode([chat(messages, student.asked)])[0]
        assert expected.spelled and found["input_ids"].tolist() == [expected.ids.tolist()]
        assert found["attention_mask"].all() and set(found) == {"input_ids", "attention_mask"}
        assert expected.ids.max() >= 256
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
    rows = [student.vocabulary.encode([chat(each, student.asked)])[0].ids.tolist() for each in messages]
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
    """With control tokens among what is generated, and up to one that ends it."""
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
    assert len(set(sum(expected, []))) > 6
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
    assert end == student.vocabulary.control[student.end] and end in student.vocabulary.part_ids("end_of_chat")
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
    """To the same tables, and the same map as the one that the teacher's tokenizer gives; exported again, to the same files."""
    student = exported(name, expansion)
    teacher = hf.load(student.folder.parent / "teacher", np.float32)
    found = families.leaves(student.ours)
    for leaf, array in families.leaves(teacher).items():
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
        assert np.array_equal(student.ngrams(rows), expected(rows)) and len(set(expected(rows).ravel())) > 20
    else:
        assert student.ngrams is None
    run("export", student.folder, tmp_path / "again", "--dtype", "float32")
    for file in student.folder.iterdir():
        if file.suffix == ".json" and file.name != "tokenizer.json":
            old, new = (json.loads((folder / file.name).read_text()) for folder in (student.folder, tmp_path / "again"))
            assert new == old, file.name
        else:
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
