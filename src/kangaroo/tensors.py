"""Tensors from files that users name: those that a module has, in precisions that can be computed with, all finite."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kangaroo.errors import AdapterError

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises AdapterError for a damaged one, and for dtypes that torch lacks."""
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raise AdapterError unless `found` has exactly the names and shapes of `wanted`, finite numbers of its kind."""
    for name in [*(wanted.keys() - found.keys()), *(found.keys() - wanted.keys())]:
        raise AdapterError(f"{path} does not fit its config: {name!r} is missing or unexpected")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            shapes = f"{list(value.shape)}, not {list(wanted[name].shape)}"
            raise AdapterError(f"{path} does not fit its config: {name!r} is of shape {shapes}")
        allowed = PRECISIONS if wanted[name].is_floating_point() else (wanted[name].dtype,)
        if value.dtype not in allowed:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise AdapterError(f"{path}: {name!r} is of type {value.dtype}; it should be {known}")
        if not torch.isfinite(value.to(wanted[name].dtype)).all():
            raise AdapterError(f"{path} is damaged: {name!r} holds values that are not finite")


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes, in whatever order: what a file says of the tensors in it, to notice its own damage."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"
