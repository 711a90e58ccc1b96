"""Which model is this? Three short hashes that do not depend on the precision a checkpoint was loaded in."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_SAMPLE = 512  # values from either end of every tensor: enough to tell models apart, quick on a large one


def fingerprint(structure: object, plain: Iterable[Tensor], everything: Iterable[Tensor]) -> str:
    """Hashes of the structure, of tensors no quantisation touches, and of all readable weights, joined by dashes."""
    shape = hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:12]
    readable = (tensor for tensor in everything if is_readable(tensor))
    return "-".join([shape, _digest(plain), _digest(readable)])


def is_readable(tensor: Tensor) -> bool:
    """Whether a weight can be read as it was trained: neither packed by a quantisation (as torchao's) nor offloaded."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.is_floating_point() and tensor.device.type != "meta"


def same_model(wanted: str, got: str, *, weights_hidden: bool) -> bool:
    """Whether two fingerprints are of one model; of hidden weights (quantised, offloaded) only the rest is compared."""
    return wanted.split("-")[:2] == got.split("-")[:2] if weights_hidden else wanted == got


def _digest(tensors: Iterable[Tensor]) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        sample = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).to("cpu", torch.bfloat16)
        hasher.update(sample.view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:12]
