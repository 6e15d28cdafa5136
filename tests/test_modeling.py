"""The modelling file for transformers, in folders as they are exported, against plain loops and the families' own classes.

Needs nothing of minalm but that file, so that it can be run beside another version of transformers:
`pytest --noconftest -p no:cacheprovider -o addopts= tests/test_modeling.py`.
"""

import copy
import importlib.util
import inspect
import json
import random
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.torch  # noqa: E402

FILE = Path(__file__).parents[1] / "minalm" / "huggingface" / "modeling_minalm.py"
LONGEST = 16
ORIGINALS = 50  # size of the original vocabulary
BOS, EOS, PAD, END = 256, 257, 258, 259
LETTERS = b"abcd"  # few, so that tokens are found at most positions
SIZES = {
    "vocab_size": 260,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
HEAD = {"head_dim": 10}
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LENGTH = 64  # of Phi 3's texts before its rotary embedding changes
LONGROPE = {"short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 3.0, 8.0]}
PHI3 = {"hidden_size": 48, "partial_rotary_factor": 0.75, "original_max_position_embeddings": LENGTH}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.25}
FAMILIES = {  # model_type: the names of its configuration and model, its own keys
    "llama": ("LlamaConfig", "LlamaForCausalLM", HEAD | {"attention_bias": True, "mlp_bias": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", HEAD | WINDOW | {"query_pre_attn_scalar": 7}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", HEAD | WINDOW | {"query_pre_attn_scalar": 7}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", WINDOW | {"use_sliding_window": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", HEAD | WINDOW | {"use_sliding_window": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", HEAD | {"sliding_window": 3}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", WINDOW),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        HEAD | {"no_rope_layers": [1, 0, 0], "sliding_window": 3, "use_sliding_window": True},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", PHI3 | {"rope_scaling": {"type": "longrope", **LONGROPE}}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", HEAD | MULTIPLIERS | {"logits_scaling": 0.6}),
}
FULLY = ("llama", "gemma2", "gemma3_text")
# transformers 5 renamed an argument, and warns of the old name.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


# --- plain references -----------------------------------------------------------------------------------------------


def key(ids):
    return ",".join(str(i + 1) for i in reversed(ids))


def longest_tokens(originals, ids, mask, longest=LONGEST):
    """The original id of the longest token that ends at each position of a row: every suffix is tried."""
    found = []
    for end in range(len(ids)):
        best = 0
        for start in range(end, max(-1, end - longest), -1):
            if not mask[start]:
                break
            if key(ids[start : end + 1]) in originals:
                best = originals[key(ids[start : end + 1])] - 1
        found.append(best)
    return found


def random_originals(seed):
    """A map as in config.json: letters and words of letters, one of `LONGEST` letters, and two special tokens."""
    rng = random.Random(seed)
    words = {"a", "b", "ab", "abcd" * (LONGEST // 4), "bcd" * 3}
    while len(words) < ORIGINALS - 4:
        words.add("".join(rng.choice("abcd") for _ in range(rng.randint(2, 5))))
    ids = rng.sample(range(1, ORIGINALS), len(words) + 2)
    tokens = [[BOS], [END], *(list(word.encode()) for word in sorted(words))]
    return {"": -1} | {key(token): i + 1 for token, i in zip(tokens, ids, strict=True)}


class Reference:
    """The family's own model, which is given the sums of the two embeddings as rows of its own table.

    So the family itself scales them, wherever its version of transformers does that.
    """

    def __init__(self, plain, table, originals):
        self.plain, self.table, self.originals = plain, table, originals
        self.embed = plain.get_input_embeddings().weight.detach().clone()
        plain.get_input_embeddings().padding_idx = None  # it may lie behind the rows

    def logits(self, ids):
        """[time, vocabulary] of one row of ids without padding."""
        found = longest_tokens(self.originals, ids, [1] * len(ids))
        self.plain.get_input_embeddings().weight.data = self.embed[ids] + self.table[found]
        with torch.no_grad():
            return self.plain(torch.arange(len(ids))[None], use_cache=False).logits[0]


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


def write(folder, family):
    """A folder as it is exported, of random weights. Returns its Reference."""
    config_name, model_name, own = FAMILIES[family]
    torch.manual_seed(7)
    plain = getattr(transformers, model_name)(
        getattr(transformers, config_name)(
            **SIZES | copy.deepcopy(own), tie_word_embeddings=False, attn_implementation="eager"
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.ndim == 1:  # norms: around what they are at first
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                parameter.copy_(torch.randn(parameter.shape))
            else:
                parameter.copy_(1.5 * torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
    table = torch.randn(ORIGINALS, plain.config.hidden_size)
    originals = random_originals(3)
    folder.mkdir()
    tensors = plain.state_dict() | {"model.expand_embed_tokens.weight": table}
    assert "lm_head.weight" in tensors
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "model_type": f"tpu_{family}",
        "architectures": [f"TPU{model_name}"],
        "auto_map": {
            "AutoConfig": f"modeling_minalm.TPU{config_name}",
            "AutoModelForCausalLM": f"modeling_minalm.TPU{model_name}",
        },
        **SIZES,
        **own,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "expand_input_ids": True,
        "expand_input_ids_maxlen": LONGEST,
        "expand_input_ids_vocab_size": ORIGINALS,
        "expand_input_ids_dict": [originals, [BOS, EOS, PAD, END]],
    }
    if values.pop("rope_scaling", None):  # as families.py writes it: AutoTokenizer of transformers 5 asks for no more
        original = {"original_max_position_embeddings": LENGTH}
        values["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 10000.0, **LONGROPE, **original}
    (folder / "config.json").write_text(json.dumps(values))
    shutil.copy(FILE, folder)
    return Reference(plain, table, originals)


def load(folder):
    """As users do, but that transformers 4 drops Gemma 2's softcap, and says so, unless attention is "eager"."""
    eager = {"attn_implementation": "eager"} if "gemma2" in (folder / "config.json").read_text() else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **eager
    )
    assert not any(info.values()), info  # no tensor is missing, left over, or of another shape
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of a family its model, Reference and folder; each is loaded once."""
    loaded = {}

    def get(family):
        if family not in loaded:
            if getattr(transformers, FAMILIES[family][1], None) is None:
                pytest.skip(f"this transformers has no {family}")
            folder = tmp_path_factory.mktemp(family) / "model"
            reference = write(folder, family)
            loaded[family] = load(folder), reference, folder
        return loaded[family]

    return get


def row(seed, length):
    """bos, then letters, with an unknown byte and a special token among them, and at their end the longest token."""
    rng = random.Random(seed)
    ids = [BOS, *(rng.choice(LETTERS) for _ in range(length - 1))]
    if length > 12:
        ids[9], ids[12] = ord("z"), END
    if length > LONGEST + 13:
        ids[-LONGEST:] = b"abcd" * (LONGEST // 4)
    return ids


def stepped(model, ids, sizes, cache=None, mask=None):
    """Logits of [batch, time] ids, fed in pieces of these sizes, and the cache."""
    pieces, start = [], 0 if cache is None else int(cache.get_seq_length())  # static: a tensor that grows
    for piece in torch.split(ids, sizes, dim=1):
        start += piece.shape[1]
        with torch.no_grad():
            outputs = model(
                piece, attention_mask=None if mask is None else mask[:, :start], use_cache=True, **{CACHE: cache}
            )
        pieces.append(outputs.logits)
        cache = outputs[CACHE]
    return torch.cat(pieces, dim=1), cache


def assert_equal(found, expected):
    assert expected.std() > 0.3  # the logits vary
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --- the lookup -----------------------------------------------------------------------------------------------------


spec = importlib.util.spec_from_file_location("modeling_alone", FILE)
MODELING = importlib.util.module_from_spec(spec)
spec.loader.exec_module(MODELING)
IDS = st.integers(0, 2) | st.sampled_from([255, 256, 400])
RUNS = st.lists(IDS, min_size=1, max_size=6).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(RUNS, max_size=30, unique=True),
    rows=st.integers(1, 12).flatmap(
        lambda time: st.lists(
            st.lists(st.tuples(IDS, st.booleans()), min_size=time, max_size=time), min_size=1, max_size=4
        )
    ),
    longest=st.integers(1, 7),
)
def test_lookup_is_that_of_a_plain_loop(tokens, rows, longest):
    originals = {"": -1} | {key(token): i + 2 for i, token in enumerate(tokens)}
    ids, mask = (torch.tensor([[pair[part] for pair in row] for row in rows]) for part in (0, 1))
    found = MODELING.Trie(originals, longest, torch.device("cpu"))((ids + 1) * mask)
    expected = [longest_tokens(originals, i, m, longest) for i, m in zip(ids.tolist(), mask.tolist(), strict=True)]
    assert found.tolist() == expected


def test_rows_of_these_tests_find_long_short_and_no_tokens():
    originals = random_originals(3)
    ids = row(0, 40)
    lengths = {value - 1: len(name.split(",")) for name, value in originals.items()} | {0: 0}
    found = [lengths[i] for i in longest_tokens(originals, ids, [1] * len(ids))]
    assert {0, 1, 2, 3, LONGEST} <= set(found)
    assert max(random_originals(3).values()) <= ORIGINALS


def test_a_family_that_transformers_lacks_is_left_out():
    code = FILE.read_text().replace("Olmo2", "Olmo99")
    names = {"__name__": MODELING.__name__}
    exec(compile(code, FILE.name, "exec"), names)
    assert {name for name in names if name.startswith("TPU")} == {
        f"TPU{name}" for family in MODELING.FAMILIES if "Olmo2Model" not in family for name in family
    }


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_are_the_familys_own_model(models, family):
    model, reference, _ = models(family)
    assert type(model).__name__ == f"TPU{FAMILIES[family][1]}"
    ids = torch.tensor([row(0, 40), row(1, 40)])
    expected = torch.stack([reference.logits(ids[i].tolist()) for i in range(2)])
    with torch.no_grad():
        assert_equal(model(ids).logits, expected)
        assert_equal(model(ids, use_cache=False).logits, expected)
    assert_equal(stepped(model, ids, 1)[0], expected)
    assert_equal(stepped(model, ids, [7, 1, 1, 20, 11])[0], expected)


@pytest.mark.parametrize("family", FULLY)
def test_expansion_matters(models, family):
    """The reference without the table is another model: a forgotten expansion would be seen."""
    model, reference, _ = models(family)
    ids = row(0, 20)
    bare = Reference(reference.plain, torch.zeros_like(reference.table), reference.originals)
    bare.embed = reference.embed
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert (logits - bare.logits(ids)).abs().max() > 1


def padded(rows):
    """Left padding of letters, with which tokens would be found if they took part."""
    time = max(map(len, rows))
    ids = [[ord("a")] * (time - len(row)) + row for row in rows]
    mask = [[0] * (time - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("family", FULLY)
def test_left_padding(models, family):
    model, reference, _ = models(family)
    rows = [row(0, 5), row(1, 16), row(2, 11)[1:]]  # the last begins with a letter
    ids, mask = padded(rows)
    with torch.no_grad():
        prefill = model(ids, attention_mask=mask).logits
    steps, _ = stepped(model, ids, [13, 1, 1, 1], mask=mask)
    early, _ = stepped(model, ids, [3, 1, 1, 4, 7], mask=mask)
    for i, ids in enumerate(rows):
        expected = reference.logits(ids)
        for found in (prefill, steps, early):
            assert_equal(found[i, -len(ids) :], expected)


@pytest.mark.parametrize("family", FULLY)
def test_a_copied_cropped_or_reordered_cache_stays_right(models, family):
    model, reference, _ = models(family)
    first, second = row(0, 12), row(1, 12)
    cache = transformers.DynamicCache()  # keeps all positions, of windows too
    stepped(model, torch.tensor([first, second]), 12, cache)
    branch = copy.deepcopy(cache)
    branch.crop(-5)
    branch.reorder_cache(torch.tensor([1, 0]))
    more = list(b"cdab")
    logits, branch = stepped(model, torch.tensor([more, more]), 1, branch)
    assert branch.get_seq_length() == 11
    assert_equal(logits[0], reference.logits(second[:7] + more)[7:])
    assert_equal(logits[1], reference.logits(first[:7] + more)[7:])
    logits, _ = stepped(model, torch.tensor([more, more]), 2, cache)  # the cache that it was copied from
    assert_equal(logits[0], reference.logits(first + more)[12:])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    logits, _ = stepped(model, torch.tensor([[100, 97], [97, 98]]), 1, cache)
    assert_equal(logits[0], reference.logits(second + more + [100, 97])[16:])
    assert_equal(logits[1], reference.logits(second + more + [97, 98])[16:])


@pytest.mark.parametrize("family", FULLY)
def test_a_static_cache_is_filled_again_after_a_reset(models, family):
    model, reference, _ = models(family)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    for seed in range(2):
        ids = row(seed, 18)
        logits, _ = stepped(model, torch.tensor([ids]), [11, 1, 1, 1, 1, 3], cache)
        assert_equal(logits[0], reference.logits(ids))
        cache.reset()


def test_a_mask_of_new_ids_alone_is_refused(models):
    model, _, _ = models("llama")
    _, cache = stepped(model, torch.tensor([row(0, 6)]), 6)
    with pytest.raises(RuntimeError, match="size"):
        model(torch.tensor([[97]]), attention_mask=torch.ones(1, 1), **{CACHE: cache})


@pytest.mark.parametrize("family", FULLY)
def test_a_cache_of_unseen_ids_is_refused(models, family):
    model, reference, _ = models(family)
    ids = torch.tensor([row(0, 6)])
    with torch.no_grad():
        foreign = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="pass the whole text as input_ids with an empty cache"):
            model(ids, **{CACHE: foreign})
        _, mixed = stepped(model, ids, 6)
        model(inputs_embeds=model.get_input_embeddings()(ids), **{CACHE: mixed})
        with pytest.raises(ValueError, match="holds 12 positions whose ids this model has not seen"):
            model(ids, **{CACHE: mixed})


@pytest.mark.parametrize("family", FULLY)
def test_inputs_embeds_are_taken_as_they_are(models, family):
    model, reference, _ = models(family)
    embeds = torch.randn(2, 9, SIZES["hidden_size"])
    with torch.no_grad():
        assert_equal(model(inputs_embeds=embeds).logits, reference.plain(inputs_embeds=embeds).logits)


@pytest.mark.parametrize("family", FULLY)
def test_loss_states_and_gradient(models, family):
    model, reference, _ = models(family)
    ids = row(0, 20)
    outputs = model(torch.tensor([ids]), labels=torch.tensor([ids]), output_hidden_states=True)
    logits = reference.logits(ids)
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-5)
    assert len(outputs.hidden_states) == 4
    model.zero_grad()
    outputs.loss.backward()
    used = set(longest_tokens(reference.originals, ids, [1] * len(ids))[:-1])  # nothing follows the last
    moved = model.model.expand_embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert set(moved) == used
    model.zero_grad()
    kept = model(torch.tensor([ids]), logits_to_keep=2)
    assert_equal(kept.logits[0].detach(), logits[-2:])
    bare = model(torch.tensor([ids]), return_dict=False)
    assert_equal(bare[0][0].detach(), logits)


# --- generation -----------------------------------------------------------------------------------------------------


def check_steps(outputs, reference, prompts, new):
    """The logits of each step are those of the reference for the text so far, cut out of the padded sequences."""
    time = outputs.sequences.shape[1] - new
    each = len(outputs.sequences) // len(prompts)
    for i, sequence in enumerate(outputs.sequences.tolist()):
        ids = prompts[i // each] + sequence[time:]
        found = torch.stack([step[i] for step in outputs.logits])
        assert_equal(found, reference.logits(ids)[len(prompts[i // each]) - 1 : -1])
    return outputs.sequences[:, time:]


@pytest.mark.parametrize("family", FULLY)
@pytest.mark.parametrize("implementation", (None, "static"))
def test_generate(models, family, implementation):
    model, reference, _ = models(family)
    prompts = [row(0, 5), row(1, 14), row(2, 9)[1:]]
    ids, mask = padded(prompts)
    new = 20
    settings = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "cache_implementation": implementation,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    greedy = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    found = check_steps(greedy, reference, prompts, new)
    # The same again: a static cache is used a second time.
    again = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    assert again.sequences.tolist() == greedy.sequences.tolist()
    one = model.generate(torch.tensor(prompts[1:2]), do_sample=False, **settings)
    assert one.sequences[0, 14:].tolist() == found[1].tolist()
    torch.manual_seed(0)
    sampled = model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3, **settings)
    found = check_steps(sampled, reference, prompts, new)
    assert len(set(map(tuple, found.tolist()))) == 9
    without = model.generate(
        ids, attention_mask=mask, do_sample=False, **{**settings, "use_cache": False, "cache_implementation": None}
    )
    assert without.sequences.tolist() == greedy.sequences.tolist()


@pytest.mark.parametrize("family", FULLY)
def test_beam_search(models, family):
    """Each sequence's score is the log-probability that the reference gives it, so beams keep the ids of their own."""
    model, reference, _ = models(family)
    prompts = [row(0, 5), row(1, 14)]
    ids, mask = padded(prompts)
    outputs = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.0,
        max_new_tokens=12,
        min_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert (outputs.beam_indices.diff(dim=1) != 0).any()  # beams do change places
    for i, sequence in enumerate(outputs.sequences.tolist()):
        new = sequence[14:]
        ids = prompts[i // 3] + new
        scores = reference.logits(ids)[-13:-1].log_softmax(-1)
        expected = scores[range(12), new].sum()
        torch.testing.assert_close(outputs.sequences_scores[i], expected, rtol=1e-4, atol=1e-4)


def test_assisted_generation_crops(models):
    """Guesses from the prompt, which the model mostly refuses, so that the cache is cropped."""
    model, reference, _ = models("llama")
    ids = torch.tensor([row(0, 30)])
    greedy = model.generate(ids, do_sample=False, max_new_tokens=24, min_new_tokens=24)
    guessed = model.generate(ids, do_sample=False, max_new_tokens=24, min_new_tokens=24, prompt_lookup_num_tokens=3)
    assert guessed.tolist() == greedy.tolist()


def test_generation_goes_on_from_a_cache(models):
    model, reference, _ = models("llama")
    ids = row(0, 20)
    _, cache = stepped(model, torch.tensor([ids[:13]]), 13)
    outputs = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
        **{CACHE: cache},
    )
    check_steps(outputs, reference, [ids], 6)


def test_a_text_that_grows_past_the_length_of_short_factors(models):
    """Phi 3 then reads the text anew: its cache is of other positions."""
    model, reference, folder = models("phi3")
    ids, new = row(0, LENGTH - 3), 8
    outputs = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
    )
    text = outputs.sequences[0].tolist()
    for step, logits in enumerate(outputs.logits):
        assert_equal(logits[0], reference.logits(text[: len(ids) + step])[-1])
    short = reference.logits(text[:LENGTH])
    assert (reference.logits(text[: LENGTH + 1])[:LENGTH] - short).abs().max() > 0.1  # all positions change
    model.save_pretrained(folder.parent / "again")
    with torch.no_grad():
        assert_equal(load(folder.parent / "again")(torch.tensor([text[:LENGTH]])).logits[0], short)


def test_generate_compiles_nothing(models, monkeypatch):
    """A static cache has it compile the steps on some devices, whose ids seen would then be in the graph."""
    model, _, _ = models("llama")
    everywhere = transformers.CompileConfig()
    everywhere._compile_all_devices = True
    compiled = []
    monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled.append(config) or model.__call__)
    settings = {"max_new_tokens": 3, "cache_implementation": "static", "compile_config": everywhere}
    model.generate(torch.tensor([row(0, 5)]), **settings)
    assert not compiled
    expanded = type(model).__mro__[1]
    monkeypatch.delattr(expanded, "_valid_auto_compile_criteria")
    model.generate(torch.tensor([row(0, 5)]), **settings)
    assert compiled  # so it would have


def write_tokenizer(folder):
    """Bytes as ids 0 .. 255, then special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # of each byte its sign in byte-level tokenizers
    signs = {byte: chr(byte) for byte in shown}
    for byte in range(256):
        signs.setdefault(byte, chr(256 + len(signs) - len(shown)))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={sign: byte for byte, sign in signs.items()}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    words = ("<bos>", "<eos>", "<pad>", "<end_of_turn>")
    tokenizer.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in words])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=[
            "input_ids",
            "attention_mask",
        ],  # transformers 4 would give token types, which no model takes
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}abab{% endif %}"
    )
    fast.save_pretrained(folder)


@pytest.mark.parametrize("family", FULLY)
def test_chat(models, family):
    pytest.importorskip("jinja2")
    model, reference, folder = models(family)
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": "Hello"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = [BOS, *b"Hello", END, *b"abab"]
    assert inputs["input_ids"].tolist() == [prompt]
    expected, ids = [], list(prompt)
    while len(expected) < 8 and END not in expected:
        expected.append(reference.logits(ids)[-1].argmax().item())
        ids.append(expected[-1])
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    found = model.generate(**inputs, eos_token_id=end, max_new_tokens=8, do_sample=False)
    assert found.tolist() == [ids]
    found = model.generate(inputs["input_ids"], eos_token_id=end, max_new_tokens=8, do_sample=False)
    assert found.tolist() == [ids]


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FULLY)
def test_saved_again_it_loads_again(models, tmp_path, family):
    model, reference, folder = models(family)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE.name).read_bytes() == FILE.read_bytes()
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    for name in old.keys() - {"torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"}:
        assert new[name] == old[name], name
    ids = torch.tensor([row(0, 20)])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_bfloat16(models):
    """The table of the expansion is of the model's dtype, as all else."""
    model, _, folder = models("gemma3_text")
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert half(torch.tensor([row(0, 20)])).logits.isfinite().all()
