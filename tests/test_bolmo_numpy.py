"""The plain numpy form of Bolmo against what must hold of it whatever the numbers are."""

import itertools

import bolmo_numpy as plain
import numpy as np
import pytest

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "local_rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_local_encoder_layers": 1,
    "num_local_decoder_layers": 2,
    "num_local_heads": 2,
    "local_intermediate_size": 20,
    "subword_vocab_size": 300,
}
SEQUENCES = {(byte + 4,): byte for byte in range(256)} | {(1,): 256, (0,): 257}
SEQUENCES |= {tuple(b + 4 for b in word): 258 + n for n, word in enumerate((b"ab", b"abc", b"bca", b"cabcabc"))}
TENSORS = plain.random_tensors(CONFIG, 0)


def text(seed, length):
    return [plain.BOS, *np.random.default_rng(seed).choice([101, 102, 103], length - 1).tolist()]


@pytest.mark.parametrize("chunk", (1, 3, 4, 64))
def test_chunks_are_the_recurrence(chunk):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 13, 2, 8))
    v = rng.standard_normal((13, 2, 5))
    i, f = 15 * np.tanh(rng.standard_normal((2, 13, 2)))
    whole, state = plain.mlstm_recurrent(q, k, v, i, f)
    found, found_state = plain.mlstm_chunkwise(q, k, v, i, f, chunk)
    np.testing.assert_allclose(found, whole, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(found_state, state):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    first, middle = plain.mlstm_chunkwise(q[:5], k[:5], v[:5], i[:5], f[:5], chunk)
    second, _ = plain.mlstm_chunkwise(q[5:], k[5:], v[5:], i[5:], f[5:], chunk, middle)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=1e-10, atol=1e-10)


def test_the_stabilizer_cancels():
    """Without its epsilon the cell is C q / max(|n q|, 1), with gates that are not scaled."""
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 9, 1, 4))
    v = rng.standard_normal((9, 1, 3))
    i, f = rng.standard_normal((2, 9, 1))
    found, _ = plain.mlstm_recurrent(q, k, v, i, f)
    C, n = np.zeros((4, 3)), np.zeros(4)
    for t in range(9):
        keep, write = plain.sigmoid(f[t, 0]), np.exp(i[t, 0])
        C, n = keep * C + write * np.outer(k[t, 0], v[t, 0]), keep * n + write * k[t, 0]
        scaled = q[t, 0] / 2
        np.testing.assert_allclose(found[t, 0], C.T @ scaled / max(abs(n @ scaled), 1.0), rtol=1e-3)


def test_parameters_of_the_published_sizes():
    """The numbers of parameters of the released models, by part."""
    common = {"num_local_encoder_layers": 1, "num_local_decoder_layers": 4, "num_local_heads": 16}
    common |= {"subword_vocab_size": 100278}
    small = {"hidden_size": 2048, "intermediate_size": 8192, "local_intermediate_size": 2816}
    small |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 16)
    large = {"hidden_size": 4096, "intermediate_size": 11008, "local_intermediate_size": 5504}
    large |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 32)
    for config, blocks, whole in ((small, 1_073_872_896, 1_468_911_776), (large, 6_476_529_664, 7_633_084_576)):
        sizes = {name: int(np.prod(shape)) for name, shape in plain.shapes(common | config).items()}
        assert sum(size for name, size in sizes.items() if name.startswith("model.layers.")) == blocks
        assert sum(sizes.values()) == whole


def test_what_depends_on_what():
    """A byte changes nothing before it if the boundaries are given; if they are predicted, one position before."""
    ids = text(0, 14)
    suffix = plain.suffix_ids(SEQUENCES, ids)
    logits, _, boundaries = plain.forward(CONFIG, TENSORS, ids, suffix)
    assert 3 < boundaries.sum() < 13 and boundaries[0] and not boundaries[-1]
    other = [*ids]
    other[9] = 120
    suffix = plain.suffix_ids(SEQUENCES, other)
    given, _, _ = plain.forward(CONFIG, TENSORS, other, suffix, boundaries)
    np.testing.assert_allclose(given[:9], logits[:9], rtol=1e-9, atol=1e-9)
    assert np.abs(given[9] - logits[9]).max() > 1e-3
    predicted, _, _ = plain.forward(CONFIG, TENSORS, other, suffix)
    np.testing.assert_allclose(predicted[:8], logits[:8], rtol=1e-9, atol=1e-9)


def test_longest_suffix():
    ids = [1, *(byte + 4 for byte in b"xabcabcab")]
    assert plain.suffix_ids(SEQUENCES, ids).tolist() == [
        256, ord("x"), ord("a"), 258, 259, 260, 258, 259, 260, 258,
    ]  # fmt: skip
    assert plain.suffix_ids(SEQUENCES, [i + 260 for i in ids]).tolist() == plain.suffix_ids(SEQUENCES, ids).tolist()


def test_fused_labels():
    ids, boundaries = [1, 10, 11, 1, 12, 0], [True, False, True, True, True, False]
    valid = [True, True, True, True, False, False]
    assert plain.fused_labels(ids, boundaries, valid).tolist() == [10, 271, 261, 12, -1, -1]


def test_patches_are_disjoint_events():
    """Over all strings of up to four of three bytes, the probabilities that a patch is one, and that none has ended, sum
    to 1: made from a model of bytes that depends on all that stands before."""
    letters, longest = (4, 5, 6), 4

    def logp(before):
        rng = np.random.default_rng([len(before), *before])
        scores = np.full(2 * plain.PLAIN, -np.inf)
        scores[[*letters, *(letter + plain.PLAIN for letter in letters)]] = rng.standard_normal(6)
        return plain.log_softmax(scores)

    total = 0.0
    for length in range(1, longest + 1):
        for string in itertools.product(letters, repeat=length):
            ids = [1, *string]
            rows = np.array([logp(string[:t]) for t in range(length + 1)])
            boundaries = [True, *[False] * (length - 1), True]
            [patch] = plain.patch_logp(rows, ids, boundaries)
            total += np.exp(patch)
            if length == longest:
                total += np.exp(sum(rows[t, string[t]] for t in range(length)))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_bernoulli_kl():
    p, q = np.array([0.3, 0.9]), np.array([0.2, 0.95])
    a, d = p ** (1 / 5), q ** (1 / 5)
    expected = a * np.log(a / d) + (1 - a) * np.log((1 - a) / (1 - d))
    np.testing.assert_allclose(plain.bernoulli_kl(np.log(p), np.log(q), epsilon=0.0), expected, rtol=1e-9)
    np.testing.assert_allclose(plain.bernoulli_kl(np.log(p), np.log(p)), 0.0, atol=1e-12)


def test_two_sided_scores_are_no_distribution():
    """Given a text, the probabilities of all next bytes sum to 1, but not if each has chosen where the text's last patch
    ends."""
    context = text(1, 4)
    boundaries = plain.prompt_boundaries(CONFIG, TENSORS, SEQUENCES, context)
    logits, _, _ = plain.forward(CONFIG, TENSORS, context, plain.suffix_ids(SEQUENCES, context), boundaries)
    causal = plain.fold(plain.log_softmax(logits[-1]))
    assert np.exp(causal).sum() == pytest.approx(1.0, abs=1e-9)
    for byte in (101, 200):
        [found] = plain.causal_logp(CONFIG, TENSORS, SEQUENCES, context, [byte])
        assert found == pytest.approx(causal[byte], abs=1e-12)
    two_sided = [plain.two_sided_logp(CONFIG, TENSORS, SEQUENCES, [*context, byte])[-1] for byte in range(plain.PLAIN)]
    assert abs(np.exp(two_sided).sum() - 1.0) > 1e-3
