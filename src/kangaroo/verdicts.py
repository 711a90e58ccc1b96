"""What trials found, kept on disk for each machine, so that a second load need not try again."""

import hashlib
import json
from typing import Any

import torch

from kangaroo.errors import CapacityError, ConfigError, DataError
from kangaroo.files import cache_folder
from kangaroo.machine import device_name, machine, versions
from kangaroo.sealed import read_sealed, write_sealed

VERSION = 2
"""Of the trials themselves: what another version found is tried again."""


class Verdicts:
    """Findings by name, of one machine, one number of threads and one set of library versions."""

    def __init__(self, device: torch.device, *, threads: bool = True):
        """Without `threads`, findings hold for any number of them."""
        facts = machine()
        self._of = {
            "version": VERSION,
            "cpu": [facts["cpu"], facts["cpu_capability"], torch.get_num_threads() if threads else None],
            "device": "cpu" if device.type == "cpu" else device_name(),
            "libraries": versions(),
        }
        name = hashlib.sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()[:16]
        self._path = cache_folder() / "trials" / f"{name}.json"
        self._known = self._read()
        self._new: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """What was found, as JSON knows it; None if nothing was."""
        return self._new.get(name, self._known.get(name))

    def set(self, name: str, finding: Any) -> None:
        """Note a finding; `save` keeps it."""
        self._new[name] = finding

    def save(self) -> str | None:
        """Write what is new, beside what others have written meanwhile. Returns why that could not be done, or None."""
        if not self._new:
            return None
        try:
            write_sealed(self._path, {"of": self._of, "found": self._read() | self._new})
        except (CapacityError, ConfigError) as error:  # a load must not fail because a home is read-only
            return f"the trial is repeated at every load: {error}"
        return None

    def _read(self) -> dict[str, Any]:
        try:
            table = read_sealed(self._path, "trials' findings", DataError)
        except DataError:  # nothing kept yet, or nothing that can be relied on: tried again, and replaced
            return {}
        kept = table.get("found") if table.get("of") == self._of else None
        return kept if isinstance(kept, dict) else {}
