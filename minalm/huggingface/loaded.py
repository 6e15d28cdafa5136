"""A model with its vocabulary, as training, generation and evaluation read it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minalm.errors import InputError
from minalm.huggingface import weights
from minalm.huggingface.folder import load_vocabularies
from minalm.models.bolmo import Bolmo
from minalm.models.head import VocabularyMask
from minalm.models.transformer import Transformer
from minalm.tokenization.suffixes import LongestSuffix
from minalm.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True)
class LoadedModel:
    """A model and how it reads text."""

    model: Transformer | Bolmo  # the weights in their files, or tables of a new vocabulary on the host
    vocabulary: Vocabulary | None  # None: the model's shapes alone are known
    suffixes: LongestSuffix | None  # of a model with an input expansion
    mask: VocabularyMask

    @classmethod
    def of_shapes(cls, model: Transformer | Bolmo) -> "LoadedModel":
        """A model that is not there, to compile for."""
        rows = model.config.vocab_size * (2 if isinstance(model, Bolmo) else 1)
        mask = VocabularyMask(*(np.zeros(rows, bool) for _ in range(2)))
        return cls(model, None, None, mask)

    @classmethod
    def read(cls, name: Path) -> "LoadedModel":
        """A folder, a model of the hub, or what a run has exported. Raises InputError."""
        folder = model_folder(name)
        return cls.of(weights.read(folder), *load_vocabularies(folder))

    @classmethod
    def of(cls, model: Transformer | Bolmo, vocabulary: Vocabulary, suffixes: LongestSuffix | None) -> "LoadedModel":
        """Raises InputError if the tokenizer has more ids than the model has rows."""
        rows = model.config.vocab_size
        exists, boundary = np.arange(rows) < vocabulary.size, vocabulary.boundary_mask(rows)
        if isinstance(model, Bolmo):  # which predicts each id, and each id that also ends a patch
            exists, boundary = np.tile(exists, 2), np.tile(boundary, 2)
        return cls(model, vocabulary, suffixes, VocabularyMask(exists, boundary))


def model_folder(name: Path) -> Path:
    """The Hugging Face folder of a model: that folder itself, `hf/` of a run's folder, or what was fetched of the hub.

    Raises InputError for a run that has exported nothing yet.
    """
    if (name / "run.json").is_file() and not (name / "config.json").is_file():
        if not (name / "hf").is_dir():
            raise InputError(
                f"the run {name} has exported no model yet: python convert.py export {name} FOLDER writes one"
            )
        return name / "hf"
    return weights.find(name)
