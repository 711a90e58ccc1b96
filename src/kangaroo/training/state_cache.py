"""The frozen target's last states, computed once for each row of text and kept in files.

A run of several epochs, or several runs on the same text, then pay for the target's deep layers once. A file is named
by all that its states depend on, so any number of runs may use one folder, and none can find another's states there.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from kangaroo.errors import CapacityError, DataError, KangarooError
from kangaroo.files import write_atomically
from kangaroo.inputs import is_file
from kangaroo.model import Target
from kangaroo.tensors import checksum
from kangaroo.training import ranks
from kangaroo.training.batches import Batch, place_documents

AT_ONCE = 128
"""Positions whose logits are made at once: enough for a product to be fast, few enough for a processor's caches."""
LAYOUT = b"states, normaliser, best"
"""What a file holds; files of another layout are not found."""


@dataclass(frozen=True, slots=True)
class Final:
    """What the target makes of M positions."""

    states: Tensor
    """[M, D] before its final norm."""
    normaliser: Tensor | None = None
    """[M] float32, the logarithm of the sum over all tokens of exp(logit): the chance of some tokens needs no others'
    logits. None where nobody has counted it yet."""
    best: Tensor | None = None
    """[M] the most probable token; likewise."""

    def __getitem__(self, some: slice) -> "Final":
        """Some of the positions."""
        if self.normaliser is None or self.best is None:
            return Final(self.states[some])
        return Final(self.states[some], self.normaliser[some], self.best[some])

    @classmethod
    def join(cls, parts: Sequence["Final"]) -> "Final":
        """Positions one after another, of parts that have all been counted."""
        columns = [[getattr(part, name) for part in parts] for name in ("states", "normaliser", "best")]
        return cls(*(torch.cat(column) for column in columns))

    @torch.no_grad()
    def counted(self, target: Target) -> "Final":
        """The same with normaliser and best."""
        sums, best = [], []
        for states in torch.split(self.states, AT_ONCE):
            logits = target.logits(target.norm(states)).float()
            highest, where = _peak(logits)
            sums.append(logits.sub_(highest[:, None]).exp_().sum(-1).log() + highest)
            best.append(where)
        none = self.states.new_zeros(0)
        return Final(self.states, torch.cat(sums or [none.float()]), torch.cat(best or [none.long()]))


def _peak(logits: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """(greatest [M], its first place [M]) of logits [M, V], as `max` has it; on CPUs, searching one block is faster."""
    blocks = functional.pad(logits, (0, -logits.shape[1] % block), value=-math.inf).reshape(len(logits), -1, block)
    highest, where = blocks.amax(2).max(1)
    rows = torch.arange(len(logits), device=logits.device)
    return highest, where * block + blocks[rows, where].argmax(1)


class StateCache:
    """What the target makes of rows of text, kept until the folder is full; what came later is computed each time."""

    def __init__(self, folder: Path, target: Target, mixed_precision: str, limit: float = math.inf):
        """`limit` is how many bytes the folder may hold, other runs' files among them; ranks share what is left."""
        self.folder, self.target = folder, target
        self._room = (limit - sum(path.stat().st_size for path in folder.rglob("*.safetensors"))) / ranks.count()
        self.computed_by = (
            LAYOUT + f"{target.fingerprint} {target.dtype} {target.device.type} {mixed_precision}".encode()
        )

    def at(self, batch: Batch, mask: Tensor) -> Final:
        """Those of the M positions that the mask [B, T] marks, row by row.

        A row is always computed alone, so that its states do not depend on the rows it first came with.

        Raises CapacityError if states cannot be written, DataError if a file cannot be read.
        """
        rows = range(len(mask))
        return Final.join([self._row(batch[i : i + 1], mask[i : i + 1]) for i in rows])

    def _row(self, row: Batch, mask: Tensor) -> Final:
        path = self._path(row, mask)
        if is_file(path):
            return self._read(path)
        with torch.no_grad():
            x, _ = self.target.run(self.target.embed(row.tokens), place_documents(row), None)
        final = Final(x[mask].contiguous()).counted(self.target)
        self._write(path, final)
        return final

    def _path(self, row: Batch, mask: Tensor) -> Path:
        assert row.documents is not None
        content = hashlib.sha256(self.computed_by)
        for part in (row.tokens, row.documents, mask):
            content.update(part.cpu().numpy().tobytes())
        name = content.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, path: Path) -> Final:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                noted = (file.metadata() or {}).get("checksum")
            if noted is not None and noted != checksum(tensors):
                raise ValueError("they are not what was written")
            return Final(**{name: tensor.to(self.target.device) for name, tensor in tensors.items()})
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise DataError(f"cannot read the target's states in {path}: {error}. Delete the file") from None

    def _write(self, path: Path, final: Final) -> None:
        assert final.normaliser is not None
        assert final.best is not None
        tensors = {"states": final.states, "normaliser": final.normaliser, "best": final.best}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self._room:
            return
        self._room -= size
        try:
            write_atomically(path, lambda part: save_file(tensors, part, metadata={"checksum": checksum(tensors)}))
        except KangarooError as error:
            raise CapacityError(
                f"cannot keep the target's states in {self.folder}: {error}. Make room, or drop the recipe's states"
            ) from None
