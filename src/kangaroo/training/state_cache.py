"""The frozen target's last states, computed once for each row of text and kept in files.

A run of several epochs, or several runs on the same text, then pay for the target's deep layers once. A file is named
by all that its states depend on, so any number of runs may use one folder, and none can find another's states there.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kangaroo.errors import CapacityError, DataError, KangarooError
from kangaroo.files import write_atomically
from kangaroo.inputs import is_file
from kangaroo.model import Target
from kangaroo.training.batches import Batch, place_documents


class StateCache:
    """The target's states before its final norm, by rows."""

    def __init__(self, folder: Path, target: Target, mixed_precision: str):
        self.folder, self.target = folder, target
        self.computed_by = f"{target.fingerprint} {target.dtype} {target.device.type} {mixed_precision}".encode()

    def at(self, batch: Batch, mask: Tensor) -> Tensor:
        """[M, D] at the M positions that the mask [B, T] marks, row by row.

        A row is always computed alone, so that its states do not depend on the rows it first came with.

        Raises CapacityError if states cannot be written, DataError if a file cannot be read.
        """
        rows = range(len(mask))
        return torch.cat([self._row(batch[i : i + 1], mask[i : i + 1]) for i in rows]).to(self.target.device)

    def _row(self, row: Batch, mask: Tensor) -> Tensor:
        path = self._path(row, mask)
        if is_file(path):
            return self._read(path)
        with torch.no_grad():
            x, _ = self.target.run(self.target.embed(row.tokens), place_documents(row), None)
        states = x[mask].contiguous()
        self._write(path, states)
        return states

    def _path(self, row: Batch, mask: Tensor) -> Path:
        assert row.documents is not None
        content = hashlib.sha256(self.computed_by)
        for part in (row.tokens, row.documents, mask):
            content.update(part.cpu().numpy().tobytes())
        name = content.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, path: Path) -> Tensor:
        try:
            states = load_file(path)["states"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"cannot read the target's states in {path}: {error}. Delete the file") from None
        return states

    def _write(self, path: Path, states: Tensor) -> None:
        try:
            write_atomically(path, lambda part: save_file({"states": states}, part))
        except KangarooError as error:
            raise CapacityError(
                f"cannot keep the target's states in {self.folder}: {error}. Make room, or drop the recipe's states"
            ) from None
