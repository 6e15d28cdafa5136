"""The kinds of models in Hugging Face folders: what config.json says of each, and the names of its tensors."""

from typing import Any, Literal

from minalm.huggingface import bolmo, families
from minalm.huggingface.families import Family, Parts
from minalm.models.config import BolmoConfig, ModelConfig


def parse_config(source: str, values: object) -> tuple[Family, ModelConfig | BolmoConfig]:
    """The family (of a Bolmo: its trunk's) and the architecture that the values of a config.json describe; `source` is
    what messages call it. Raises InputError, naming the key, for what is not implemented."""
    if isinstance(values, dict) and values.get("model_type") == bolmo.MODEL_TYPE:
        return bolmo.parse_config(source, values)
    return families.parse_config(source, values)


def config_values(config: ModelConfig | BolmoConfig, dtype: Literal["bfloat16", "float32"]) -> dict[str, Any]:
    """The values of config.json for an architecture. Raises InputError for one that no family can express."""
    if isinstance(config, BolmoConfig):
        return bolmo.config_values(config, dtype)
    return families.config_values(config, dtype)


def tensor_maps(family: Family, config: ModelConfig | BolmoConfig) -> dict[str, Parts]:
    """Name of each tensor of a folder -> its parts of the model: one table for both directions."""
    if isinstance(config, BolmoConfig):
        return bolmo.tensor_maps(family, config)
    return families.tensor_maps(family, config)


def code(config: ModelConfig | BolmoConfig) -> str | None:
    """The name of the file beside this one that transformers needs for such a model; None: its own classes do."""
    if isinstance(config, BolmoConfig):
        return f"{bolmo.MODELING}.py"
    return f"{families.MODELING}.py" if config.expansion_size is not None else None
