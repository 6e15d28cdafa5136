"""The parameters of a small Bolmo or of its teacher as the tensors of a published folder, written out plainly: for
bolmo_numpy.py, which knows nothing of the package."""

import numpy as np
from bolmo_numpy import PLAIN, SPECIALS

# Our row of a table of ids for each published one: special tokens stand behind the bytes here, before them there.
ROWS = np.concatenate([256 + np.arange(SPECIALS), np.arange(256)])
ROWS = np.concatenate([ROWS, PLAIN + ROWS])


def their_ids(ids):
    """Our ids, fused or not, as published ones."""
    found = np.empty(len(ROWS), np.int64)
    found[ROWS] = np.arange(len(ROWS))
    return found[np.asarray(ids)]


def rows(matrix, outputs=1):
    """[in, out] or [in, head, channel] as [out, in]; `outputs` dimensions stand at the end."""
    matrix = np.asarray(matrix)
    return matrix.reshape(*matrix.shape[: matrix.ndim - outputs], -1).reshape(-1, np.prod(matrix.shape[-outputs:])).T


def blocks(model):
    """Of stacked blocks and the last one: their tensors, OLMo 2's."""
    found = {}
    count = len(model.blocks.attention.q)
    for layer in range(count + 1):

        def of(leaf, last, layer=layer):
            return np.asarray(last if layer == count else leaf[layer])

        stacked, last, name = model.blocks, model.last, f"model.layers.{layer}."
        for part in "qkv":
            matrix = of(getattr(stacked.attention, part), getattr(last.attention, part))
            found[f"{name}self_attn.{part}_proj.weight"] = rows(matrix, 2)
        found[f"{name}self_attn.o_proj.weight"] = rows(of(stacked.attention.o, last.attention.o))
        for part in ("q_norm", "k_norm"):
            found[f"{name}self_attn.{part}.weight"] = of(
                getattr(stacked.attention, part), getattr(last.attention, part)
            )
        for part in ("gate", "up", "down"):
            found[f"{name}mlp.{part}_proj.weight"] = rows(of(getattr(stacked.mlp, part), getattr(last.mlp, part)))
        found[f"{name}post_attention_layernorm.weight"] = of(stacked.attention_post_norm, last.attention_post_norm)
        found[f"{name}post_feedforward_layernorm.weight"] = of(stacked.mlp_post_norm, last.mlp_post_norm)
    return found


def local_block(name, block):
    mlstm = block.mlstm
    return {
        f"{name}pre_xlstm_layernorm.weight": block.norm,
        f"{name}xlstm.q.weight": rows(mlstm.q, 2),
        f"{name}xlstm.k.weight": rows(mlstm.k, 2),
        f"{name}xlstm.v.weight": rows(mlstm.v, 2),
        f"{name}xlstm.ogate_preact.weight": rows(mlstm.output_gate, 2),
        f"{name}xlstm.igate_preact.weight": rows(mlstm.input_gate),
        f"{name}xlstm.fgate_preact.weight": rows(mlstm.forget_gate),
        f"{name}xlstm.igate_preact.bias": mlstm.input_bias,
        f"{name}xlstm.fgate_preact.bias": mlstm.forget_bias,
        f"{name}xlstm.multihead_norm.weight": np.reshape(mlstm.norm, -1),
        f"{name}xlstm.out_proj.weight": rows(mlstm.out),
        f"{name}pre_feedforward_layernorm.weight": block.mlp_norm,
        f"{name}mlp.gate_proj.weight": rows(block.mlp.gate),
        f"{name}mlp.up_proj.weight": rows(block.mlp.up),
        f"{name}mlp.down_proj.weight": rows(block.mlp.down),
    }


def of_bolmo(model):
    """All tensors, float64."""
    import jax

    encoder, decoder = "model.local_encoder.", "model.local_decoder."
    found = {
        f"{encoder}byte_embedding.weight": np.asarray(model.embed)[ROWS],
        f"{encoder}subword_embedding.weight": model.expansion,
        f"{encoder}post_last_block_norm.weight": model.encoder_norm,
        f"{encoder}out_projection.weight": rows(model.pool.weight),
        f"{encoder}out_projection.bias": model.pool.bias,
        f"{encoder}boundary_predictor_module.q_proj_layer.weight": rows(model.boundary.q),
        f"{encoder}boundary_predictor_module.k_proj_layer.weight": rows(model.boundary.k),
        f"{decoder}initial_norm.weight": model.patch_norm,
        f"{decoder}in_projection.weight": rows(model.depool.weight),
        f"{decoder}in_projection.bias": model.depool.bias,
        "model.norm.weight": model.norm,
        "lm_head.weight": np.asarray(model.unembed)[ROWS],
    }
    for number in range(model.config.encoder_layers):
        found |= local_block(f"{encoder}layers.{number}.", jax.tree.map(lambda leaf: leaf[number], model.encoder))
    for number in range(model.config.decoder_layers - 1):
        found |= local_block(f"{decoder}layers.{number}.", jax.tree.map(lambda leaf: leaf[number], model.decoder))
    found |= local_block(f"{decoder}layers.{model.config.decoder_layers - 1}.", model.last)
    return {name: np.asarray(tensor, np.float64) for name, tensor in (found | blocks(model.patches)).items()}


def of_teacher(model):
    """All tensors of an OLMo 2 or 3, float64."""
    found = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm, "lm_head.weight": model.unembed}
    return {name: np.asarray(tensor, np.float64) for name, tensor in (found | blocks(model)).items()}


def config_of(config):
    """The keys of a published config.json."""
    trunk = config.blocks
    return {
        "hidden_size": trunk.embed,
        "intermediate_size": trunk.mlp,
        "num_hidden_layers": trunk.layers,
        "num_attention_heads": trunk.heads,
        "num_key_value_heads": trunk.kv_heads,
        "head_dim": trunk.head_dim,
        "rms_norm_eps": trunk.norm_eps,
        "local_rms_norm_eps": config.local_norm_eps,
        "rope_theta": trunk.rope.theta,
        "sliding_window": next((window for window in trunk.windows if window), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in trunk.windows],
        "subword_vocab_size": config.expansion_size,
        "num_local_encoder_layers": config.encoder_layers,
        "num_local_decoder_layers": config.decoder_layers,
        "num_local_heads": config.heads,
        "local_intermediate_size": config.mlp,
    }
