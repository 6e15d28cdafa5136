"""Writes tests/fixtures: tiny models with random weights, and the logits that transformers computes from them.

Run by hand, in an environment with torch and transformers (the numbers stored were made with torch 2.13.0 and
transformers 5.24.0): `python tests/make_fixtures.py`, or with the names of those to make. All sizes differ, so that no
two axes can be confused; weights and settings are such that every switch moves the logits (test_models.py asserts it).
Weights are stored in bfloat16 and computed with in float32.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {
    "vocab_size": 58,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 0.3,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
}
GEMMA2 = {
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "query_pre_attn_scalar": 7,
    "sliding_window": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
    "query_pre_attn_scalar": 7,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OLMO3 = {
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": YARN,
    },
    **WINDOWS,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Phi3Config compares the lengths of the factors with hidden size / heads.
PHI3_SIZES = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 48}
PHI3 = {
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.3, 2.0],
        "long_factor": [1.5, 3.0, 8.0],
        "partial_rotary_factor": 0.75,
    },
    "max_position_embeddings": 64,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.25,
    "logits_scaling": 0.6,
}
MODELS = {
    "llama3": LlamaConfig(**SIZES, **LLAMA3, tie_word_embeddings=False),
    "llama3_tied": LlamaConfig(**SIZES, **LLAMA3, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, **GEMMA2, tie_word_embeddings=True),
    "gemma2_untied": Gemma2Config(**SIZES, **GEMMA2, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA3),
    "mistral": MistralConfig(**SIZES, **PLAIN, sliding_window=3),
    "qwen2": Qwen2Config(**SIZES, **PLAIN, **WINDOWS, use_sliding_window=True),
    "qwen2_yarn": Qwen2Config(**SIZES, **PLAIN | {"rope_parameters": {**YARN, "truncate": False}}),
    "qwen3": Qwen3Config(**SIZES, **PLAIN, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**SIZES, **PLAIN),
    "olmo3": Olmo3Config(**SIZES, **OLMO3),
    "llama3_biased": LlamaConfig(**SIZES, **LLAMA3, attention_bias=True, mlp_bias=True),
    "gemma3_seeing": Gemma3Config(
        text_config=Gemma3TextConfig(**SIZES, **GEMMA3), vision_config=VISION, mm_tokens_per_image=4
    ),
    "smollm3": SmolLM3Config(
        **SIZES, **PLAIN, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=3
    ),  # windows where there are no positions
    "phi3": Phi3Config(**PHI3_SIZES, **PHI3, original_max_position_embeddings=16, sliding_window=5),
    "phi3_long": Phi3Config(**PHI3_SIZES, **PHI3, original_max_position_embeddings=8),  # less than the 11 tokens
    "granite": GraniteConfig(**SIZES, **PLAIN, **GRANITE),
}


def main() -> None:
    for seed, (name, config) in enumerate(MODELS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(seed)
        # Gemma 2's scores and logits must be large enough for its soft-caps; those of the others, which nothing bounds,
        # small enough for float32: with 1.5 transformers itself is off by 1.7e-5 against float64 (Llama).
        scale = 1.5 if config.model_type == "gemma2" else 1.0
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, scale / parameter.shape[1] ** 0.5)
                else:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
                parameter.copy_(parameter.bfloat16())
            tokens = torch.randint(config.get_text_config().vocab_size, (2, 11))
            logits = model(tokens).logits
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        # In several files, with an index, for one of them.
        model.bfloat16().save_pretrained(folder, max_shard_size="20KB" if name == "llama3_tied" else "1GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez(folder / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    main()
