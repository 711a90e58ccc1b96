"""The figures of a run: metrics.jsonl, one row per step and per evaluation, and TensorBoard events on request."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kangaroo.errors import ConfigError, DataError
from kangaroo.files import write_text
from kangaroo.inputs import is_file, parse_json, read_text
from kangaroo.sealed import open_sealed, seal

METRICS = "metrics.jsonl"


class Metrics:
    """Appends rows; on entry forgets those past `step`, which a killed run wrote after its last checkpoint.

    Raises ConfigError if TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool):
        self._board = _open_board(folder / "tensorboard", step) if tensorboard else None
        self._path = folder / METRICS
        kept = [row for row in read_metrics(self._path) if row["step"] <= step] if step else []
        text = "".join(json.dumps(seal(row)) + "\n" for row in kept)
        write_text(self._path, text)
        self._file = self._path.open("a", encoding="utf-8")

    def record(self, row: Mapping[str, float]) -> None:
        """Append a row, which names its `step`. A reader, or a run resumed after a kill, sees it at once."""
        self._file.write(json.dumps(seal(row)) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name if "/" in name else f"train/{name}", value, int(row["step"]))

    def sync(self) -> None:
        """Make sure that the rows survive a power failure as well as a checkpoint does."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Unwritten(Metrics):
    """Of a rank that is not the first, which writes them."""

    def __init__(self) -> None:
        pass

    def record(self, row: Mapping[str, float]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file; a last line cut short by a kill is left out. A missing file has no rows.

    Raises DataError naming a malformed one.
    """
    if not is_file(path):
        return []
    # A whole row ends in a newline, so what follows the last one is empty or torn.
    lines = read_text(path, "metrics file", DataError).split("\n")[:-1]
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _row(line: str, where: str) -> dict[str, float]:
    row = parse_json(line, where, DataError, nan=True)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise DataError(f"{where}: damaged, as it does not say its step; delete the line to go on")
    return open_sealed(row, where, DataError)


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "run.tensorboard needs the train extra: pip install 'kangaroo-decoding[train]', or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
