"""Bolmo in plain numpy and float64, from the equations of its specification: what the tests of the real ones compare with.

Loops over bytes, patches and heads; no batches. `config` has the keys of a published config.json, `tensors` the tensors of
such a folder by name, stored as there ([out, in]). The names of sizes: T bytes, P patches, D channels.
"""

import numpy as np

SPECIALS = 4  # <pad> <bos> <eos> <bpe_token_end>
PLAIN = SPECIALS + 256  # ids of bytes; an id of PLAIN more also ends a patch
BOS = 1
NORM_EPS, CELL_EPS, GATE_CAP = 1e-6, 1e-6, 15.0  # of the mLSTM; none of them is in config.json
LAYER = "model.layers.{}."


# --- shapes and random parameters ---------------------------------------------------------------------------------


def shapes(config):
    """The shape of each tensor of a folder."""
    D, H, local = config["hidden_size"], config["num_local_heads"], config["local_intermediate_size"]
    head_dim = config.get("head_dim") or D // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    mlp = config["intermediate_size"]
    found = {
        "model.local_encoder.byte_embedding.weight": (2 * PLAIN, D),
        "model.local_encoder.subword_embedding.weight": (config["subword_vocab_size"], D),
        "model.local_encoder.post_last_block_norm.weight": (D,),
        "model.local_encoder.out_projection.weight": (D, D),
        "model.local_encoder.out_projection.bias": (D,),
        "model.local_encoder.boundary_predictor_module.q_proj_layer.weight": (D, D),
        "model.local_encoder.boundary_predictor_module.k_proj_layer.weight": (D, D),
        "model.local_decoder.initial_norm.weight": (D,),
        "model.local_decoder.in_projection.weight": (D, D),
        "model.local_decoder.in_projection.bias": (D,),
        "model.norm.weight": (D,),
        "lm_head.weight": (2 * PLAIN, D),
    }
    for side in ("encoder", "decoder"):
        for i in range(config[f"num_local_{side}_layers"]):
            name = f"model.local_{side}.layers.{i}."
            found |= {
                f"{name}pre_xlstm_layernorm.weight": (D,),
                f"{name}xlstm.q.weight": (D // 2, D),
                f"{name}xlstm.k.weight": (D // 2, D),
                f"{name}xlstm.v.weight": (D, D),
                f"{name}xlstm.ogate_preact.weight": (D, D),
                f"{name}xlstm.out_proj.weight": (D, D),
                f"{name}xlstm.igate_preact.weight": (H, D),
                f"{name}xlstm.igate_preact.bias": (H,),
                f"{name}xlstm.fgate_preact.weight": (H, D),
                f"{name}xlstm.fgate_preact.bias": (H,),
                f"{name}xlstm.multihead_norm.weight": (D,),
                f"{name}pre_feedforward_layernorm.weight": (D,),
                f"{name}mlp.gate_proj.weight": (local, D),
                f"{name}mlp.up_proj.weight": (local, D),
                f"{name}mlp.down_proj.weight": (D, local),
            }
    for i in range(config["num_hidden_layers"]):
        name = LAYER.format(i)
        found |= {
            f"{name}self_attn.q_proj.weight": (q, D),
            f"{name}self_attn.k_proj.weight": (kv, D),
            f"{name}self_attn.v_proj.weight": (kv, D),
            f"{name}self_attn.o_proj.weight": (D, q),
            f"{name}mlp.gate_proj.weight": (mlp, D),
            f"{name}mlp.up_proj.weight": (mlp, D),
            f"{name}mlp.down_proj.weight": (D, mlp),
            f"{name}post_attention_layernorm.weight": (D,),
        }
        if config.get("trunk_model_type", "olmo3") in ("olmo2", "olmo3"):
            found |= {
                f"{name}post_feedforward_layernorm.weight": (D,),
                f"{name}self_attn.q_norm.weight": (q,),
                f"{name}self_attn.k_norm.weight": (kv,),
            }
        else:  # llama
            found[f"{name}input_layernorm.weight"] = (D,)
    return found


def random_tensors(config, seed):
    """float32 tensors with which all parts matter: boundaries at some bytes, gates that open and close."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        scale = 1.0 / np.sqrt(shape[-1]) if len(shape) == 2 and "embedding" not in name else 1.0
        tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
        if "norm" in name:
            tensors[name] = (1.0 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        elif name.endswith("gate_preact.bias"):
            tensors[name] = (rng.standard_normal(shape) + (2.0 if "fgate" in name else -1.0)).astype(np.float32)
    return tensors


# --- parts -----------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def swiglu(tensors, name, x):
    gate = x @ tensors[f"{name}gate_proj.weight"].T
    return (gate * sigmoid(gate) * (x @ tensors[f"{name}up_proj.weight"].T)) @ tensors[f"{name}down_proj.weight"].T


def empty_state(heads, dk, dv):
    """(C, n, m) of an mLSTM that has read nothing."""
    return np.zeros((heads, dk, dv)), np.zeros((heads, dk)), np.zeros(heads)


def mlstm_step(state, q, k, v, i, f):
    """One position: q, k [heads, dk], v [heads, dv], capped gates i, f [heads] -> state, h [heads, dv]."""
    C, n, m = state
    log_f = log_sigmoid(f)
    m_new = np.maximum(log_f + m, i)
    keep, write = np.exp(log_f + m - m_new), np.exp(i - m_new)
    C = keep[:, None, None] * C + write[:, None, None] * k[:, :, None] * v[:, None, :]
    n = keep[:, None] * n + write[:, None] * k
    q = q / np.sqrt(q.shape[-1])
    weight = np.maximum(np.abs(np.sum(n * q, axis=-1)), np.exp(-m_new)) + CELL_EPS
    return (C, n, m_new), np.einsum("hkv,hk->hv", C, q) / weight[:, None]


def mlstm_recurrent(q, k, v, i, f, state=None):
    """All positions one by one: [T, heads, ...] -> h [T, heads, dv], state."""
    state = empty_state(q.shape[1], q.shape[2], v.shape[2]) if state is None else state
    found = []
    for t in range(len(q)):
        state, h = mlstm_step(state, q[t], k[t], v[t], i[t], f[t])
        found.append(h)
    return np.array(found).reshape(v.shape), state


def mlstm_chunkwise(q, k, v, i, f, chunk, state=None):
    """The same, of `chunk` positions at once (the last chunk may be shorter)."""
    C, n, m = empty_state(q.shape[1], q.shape[2], v.shape[2]) if state is None else state
    outputs = np.zeros(v.shape)
    for start in range(0, len(q), chunk):
        part = slice(start, min(start + chunk, len(q)))
        states = []
        for head in range(q.shape[1]):
            qs, ks, vs = q[part, head] / np.sqrt(q.shape[2]), k[part, head], v[part, head]
            b = np.cumsum(log_sigmoid(f[part, head]))
            A = b[:, None] - b[None, :] + i[part, head][None, :]
            A[np.triu_indices(len(b), 1)] = -np.inf
            M = np.maximum(b + m[head], A.max(axis=1))
            S = (qs @ ks.T) * np.exp(A - M[:, None])
            before = np.exp(b + m[head] - M)
            weight = np.maximum(np.abs(before * (qs @ n[head]) + S.sum(axis=1)), np.exp(-M)) + CELL_EPS
            outputs[part, head] = (before[:, None] * (qs @ C[head]) + S @ vs) / weight[:, None]
            a = b[-1] - b + i[part, head]
            m_new = max(b[-1] + m[head], a.max())
            keep, write = np.exp(b[-1] + m[head] - m_new), np.exp(a - m_new)
            states.append((keep * C[head] + (write[:, None] * ks).T @ vs, keep * n[head] + write @ ks, m_new))
        C, n, m = (np.array(each) for each in zip(*states))
    return outputs, (C, n, m)


def mlstm_inputs(tensors, name, x, heads):
    """(q, k, v, i, f) of an mLSTM layer for normed inputs [T, D]; the gates are capped."""
    q, k, v = ((x @ tensors[f"{name}{part}.weight"].T).reshape(len(x), heads, -1) for part in ("q", "k", "v"))
    gates = []
    for gate in ("igate_preact", "fgate_preact"):
        raw = x @ tensors[f"{name}{gate}.weight"].T + tensors[f"{name}{gate}.bias"]
        gates.append(GATE_CAP * np.tanh(raw / GATE_CAP))
    return q, k, v, *gates


def mlstm(tensors, name, x, heads):
    """An mLSTM layer: normed inputs [T, D] -> what is added to the states."""
    h, _ = mlstm_recurrent(*mlstm_inputs(tensors, name, x, heads))
    centred = h - h.mean(axis=-1, keepdims=True)
    h = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + NORM_EPS)
    h = h.reshape(len(x), -1) * tensors[f"{name}multihead_norm.weight"]
    gate = sigmoid(x @ tensors[f"{name}ogate_preact.weight"].T)
    return (gate * h) @ tensors[f"{name}out_proj.weight"].T


def local_block(config, tensors, name, x):
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, tensors[f"{name}pre_xlstm_layernorm.weight"], eps)
    x = x + mlstm(tensors, f"{name}xlstm.", normed, config["num_local_heads"])
    return x + swiglu(tensors, f"{name}mlp.", rms_norm(x, tensors[f"{name}pre_feedforward_layernorm.weight"], eps))


def suffix_ids(sequences, ids):
    """Of each position the longest subword whose bytes end there. `sequences`: byte ids of a subword -> its id."""
    ids = [int(i) % PLAIN for i in ids]
    found = []
    for end in range(1, len(ids) + 1):
        ending = (sequences.get(tuple(ids[start:end])) for start in range(end))  # the longest first
        found.append(next((subword for subword in ending if subword is not None), 0))
    return np.array(found)


def encode(config, tensors, ids, suffix):
    """Byte ids (plain or fused) -> what the encoder makes of each byte, [T, D]."""
    name = "model.local_encoder."
    ids = np.asarray(ids) % PLAIN
    x = tensors[f"{name}byte_embedding.weight"][ids] + tensors[f"{name}subword_embedding.weight"][suffix]
    for i in range(config["num_local_encoder_layers"]):
        x = local_block(config, tensors, f"{name}layers.{i}.", x)
    return rms_norm(x, tensors[f"{name}post_last_block_norm.weight"], config["local_rms_norm_eps"])


def boundary_logp(tensors, h):
    """log p that a patch ends at each byte; it depends on the next byte too."""
    name = "model.local_encoder.boundary_predictor_module."
    q, k = (h @ tensors[f"{name}{part}_proj_layer.weight"].T for part in ("q", "k"))
    logp = np.full(len(h), -100_000.0)
    for t in range(len(h) - 1):
        lengths = max(np.linalg.norm(q[t]), 1e-12) * max(np.linalg.norm(k[t + 1]), 1e-12)
        logp[t] = np.log1p(-min(q[t] @ k[t + 1] / lengths, 1 - 1e-3)) - np.log(2)
    logp[0] = 0.0
    return logp


def patch_inputs(tensors, h, boundaries):
    """What the trunk reads, [P, D]: the encoder's output at the bytes that end a patch, projected."""
    name = "model.local_encoder.out_projection."
    return h[np.flatnonzero(boundaries)] @ tensors[f"{name}weight"].T + tensors[f"{name}bias"]


def window(config, layer):
    """How many patches a layer sees; None: all before it."""
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    return config["sliding_window"] if kinds[layer] == "sliding_attention" else None


def attention(config, tensors, name, x, window):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (x @ tensors[f"{name}{part}_proj.weight"].T for part in "qkv")
    if f"{name}q_norm.weight" in tensors:
        q = rms_norm(q, tensors[f"{name}q_norm.weight"], config["rms_norm_eps"])
        k = rms_norm(k, tensors[f"{name}k_norm.weight"], config["rms_norm_eps"])
    q, k, v = q.reshape(len(x), heads, -1), k.reshape(len(x), kv_heads, -1), v.reshape(len(x), kv_heads, -1)
    half = q.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / config["rope_theta"] ** (np.arange(half) / half)

    def rotate(x):
        first, second = x[..., :half], x[..., half:]
        sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k = rotate(q), rotate(k)
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    visible = (distance >= 0) & (distance < (len(x) + 1 if window is None else window))
    outputs = np.zeros_like(q)
    for head in range(heads):
        shared = head * kv_heads // heads
        scores = np.where(visible, q[:, head] @ k[:, shared].T / np.sqrt(2 * half), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, shared]
    return outputs.reshape(len(x), -1) @ tensors[f"{name}o_proj.weight"].T


def trunk(config, tensors, g):
    """The subword model's blocks: patch inputs [P, D] -> the states after each block, a list."""
    states, eps = [], config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        name = LAYER.format(i)

        def norm(x, part, name=name):
            return rms_norm(x, tensors[f"{name}{part}.weight"], eps)

        if f"{name}input_layernorm.weight" in tensors:
            g = g + attention(config, tensors, f"{name}self_attn.", norm(g, "input_layernorm"), window(config, i))
            g = g + swiglu(tensors, f"{name}mlp.", norm(g, "post_attention_layernorm"))
        else:
            mixed = attention(config, tensors, f"{name}self_attn.", g, window(config, i))
            g = g + norm(mixed, "post_attention_layernorm")
            g = g + norm(swiglu(tensors, f"{name}mlp.", g), "post_feedforward_layernorm")
        states.append(g)
    return states


def decode(config, tensors, h, patches, boundaries):
    """Logits [T, 2 * PLAIN] of the next byte, from the encoder's bytes and the trunk's patches [P, D]."""
    name = "model.local_decoder."
    patches = rms_norm(patches, tensors[f"{name}initial_norm.weight"], config["local_rms_norm_eps"])
    x = h @ tensors[f"{name}in_projection.weight"].T + tensors[f"{name}in_projection.bias"]
    x = x + patches[np.cumsum(boundaries) - 1]
    for i in range(config["num_local_decoder_layers"]):
        x = local_block(config, tensors, f"{name}layers.{i}.", x)
    return rms_norm(x, tensors["model.norm.weight"], config["rms_norm_eps"]) @ tensors["lm_head.weight"].T


def double(tensors):
    return {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}


def forward(config, tensors, ids, suffix, boundaries=None):
    """Logits [T, 2 * PLAIN] with these boundaries, or those that are predicted; and the boundaries' log p."""
    tensors = double(tensors)
    h = encode(config, tensors, ids, suffix)
    logp = boundary_logp(tensors, h)
    if boundaries is None:
        boundaries = logp > np.log(0.5)
    patches = trunk(config, tensors, patch_inputs(tensors, h, boundaries))[-1]
    return decode(config, tensors, h, patches, boundaries), logp, np.asarray(boundaries, bool)


# --- symbols, generation, likelihoods ---------------------------------------------------------------------------------


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def fold(logp):
    """Log-probabilities of bytes, whether or not they end a patch."""
    return np.logaddexp(logp[..., :PLAIN], logp[..., PLAIN : 2 * PLAIN])


def fused_labels(ids, boundaries, valid):
    """The label of each position: the next byte, fused if a patch ends there; -1 where `valid` is False."""
    labels = np.full(len(ids), -1)
    for t in range(len(ids) - 1):
        if valid[t]:
            labels[t] = ids[t + 1] % PLAIN + (PLAIN if boundaries[t + 1] and valid[t + 1] else 0)
    return labels


def prompt_boundaries(config, tensors, sequences, ids):
    """Where the patches of a prompt end. All but its last byte are predicted; the decoder chooses for the last one.

    Returned of a prompt of one byte: that it ends a patch.
    """
    if len(ids) == 1:
        return np.array([True])
    suffix = suffix_ids(sequences, ids)
    boundaries = boundary_logp(double(tensors), encode(config, double(tensors), ids, suffix)) > np.log(0.5)
    logits, _, _ = forward(config, tensors, ids[:-1], suffix[:-1], boundaries[:-1])
    last = ids[-1] % PLAIN
    boundaries[-1] = logits[-1, last + PLAIN] > logits[-1, last]
    return boundaries


def generate(config, tensors, sequences, prompt, new, stops=()):
    """The most probable continuation: fused and plain ids. Everything is computed anew for each byte."""
    ids = [int(i) % PLAIN for i in prompt]
    boundaries = list(prompt_boundaries(config, tensors, sequences, ids))
    written = []
    while len(written) < new:
        logits, _, _ = forward(config, tensors, ids, suffix_ids(sequences, ids), np.array(boundaries))
        written.append(int(logits[-1].argmax()))
        if written[-1] % PLAIN in stops:
            break
        ids.append(written[-1] % PLAIN)
        boundaries.append(written[-1] >= PLAIN)
    return written


def causal_logp(config, tensors, sequences, context, continuation):
    """log p of each byte of a continuation. The decoder says where patches end, knowing nothing of what follows."""
    ids = [int(i) % PLAIN for i in context]
    boundaries = list(prompt_boundaries(config, tensors, sequences, ids))
    found = []
    for byte in continuation:
        logits, _, _ = forward(config, tensors, ids, suffix_ids(sequences, ids), np.array(boundaries))
        found.append(fold(log_softmax(logits[-1]))[byte])
        ids.append(int(byte))
        boundaries.append(logits[-1, byte + PLAIN] > logits[-1, byte])
    return np.array(found)


def two_sided_logp(config, tensors, sequences, ids):
    """log p of each byte but the first, with boundaries that were predicted from the byte that follows each: too good."""
    logits, _, _ = forward(config, tensors, ids, suffix_ids(sequences, ids))
    return fold(log_softmax(logits))[np.arange(len(ids) - 1), np.asarray(ids[1:]) % PLAIN]


# --- losses -------------------------------------------------------------------------------------------------------------


def log1mexp(x):
    """log(1 - exp(x)) for x < 0."""
    return np.where(x < -np.log(2), np.log1p(-np.exp(np.minimum(x, -np.log(2)))), np.log(-np.expm1(x)))


def cross_entropy(logits, labels):
    """The mean over the labels that are not -1."""
    places = np.flatnonzero(np.asarray(labels) >= 0)
    return -log_softmax(logits)[places, np.asarray(labels)[places]].mean()


def boundary_loss(logp, targets, valid):
    """Binary cross-entropy of predicted boundaries, the mean over valid positions; the last one is never predicted."""
    total = 0.0
    for t in range(len(logp) - 1):
        if valid[t]:
            capped = min(logp[t], -1e-3)
            total -= capped if targets[t] else log1mexp(np.array(capped))
    return total / np.sum(valid)


def representation_loss(student, teacher):
    """Mean distance of the patches' states, divided by the root of the channels: both [P, D], the same patches."""
    return np.mean(np.linalg.norm(student - teacher, axis=-1)) / np.sqrt(student.shape[-1])


def patch_logp(logp, ids, boundaries):
    """log p of each patch but the first, exactly as it is: its bytes, and that it ends with the last of them.

    `logp` [T, 2 * PLAIN] are the log-probabilities of what follows each position.
    """
    found, ends = [], np.flatnonzero(boundaries)
    for before, end in zip(ends[:-1], ends[1:]):
        places = range(before + 1, end + 1)
        found.append(sum(logp[t - 1, ids[t] % PLAIN + (PLAIN if t == end else 0)] for t in places))
    return np.array(found)


def bernoulli_kl(teacher, student, temperature=5.0, epsilon=1e-6):
    """KL of p^(1/temperature), as Bernoulli distributions, for log-probabilities."""
    a, d = np.asarray(teacher) / temperature - epsilon, np.asarray(student) / temperature - epsilon
    return np.exp(a) * (a - d) + (1 - np.exp(a)) * (log1mexp(a) - log1mexp(d))
