"""Models and tokenizers as folders: what transformers would stumble over is found, and said, first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError

from kangaroo.errors import ModelError
from kangaroo.inputs import is_file, is_folder, name_path, read_object

TABLES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)
_OF_LOADERS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, RecursionError, RuntimeError, TypeError),
    *(ValueError, HFValidationError, SafetensorError, StrictDataclassError),
)
"""What reading a model's files raises, in transformers and below it, where they hold something unexpected."""


@contextmanager
def reading_model(what: str, name: str | Path) -> Iterator[None]:
    """While a model's files are read by transformers: whatever it makes of them becomes a ModelError.

    Files in a folder are looked at first, as a damaged one can look to transformers as if it were not there.
    """
    shown = name_path(name)
    path = Path(name)
    if is_folder(path):
        for table in TABLES:
            if is_file(path / table):
                read_object(path / table, table, ModelError)
    elif _must_be_a_folder(str(name)):
        raise ModelError(f"cannot load {what} from {shown}: no such folder")
    try:
        yield
    except _OF_LOADERS as error:
        raise ModelError(f"cannot load {what} from {shown}: {_first_line(error)}") from None
    except Exception as error:
        # tokenizers raises nothing more special than this for a tokenizer.json that it cannot read.
        if type(error) is not Exception:
            raise
        raise ModelError(f"cannot load {what} from {shown}: {_first_line(error)}") from None


def _must_be_a_folder(name: str) -> bool:
    """Hub names have one slash at most, and begin with neither that nor a dot."""
    return name.startswith((os.sep, ".", "~")) or name.count("/") > 1 or len(name) > 200 or not name.isprintable()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
