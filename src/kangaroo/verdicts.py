"""What trials found, kept on disk for each machine, so that a second load need not try again."""

import hashlib
import json
from typing import Any

import torch

from kangaroo.errors import CapacityError, ConfigError
from kangaroo.files import cache_folder, write_json
from kangaroo.machine import device_name, machine, versions

VERSION = 6
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
        self._path = cache_folder() / "trials" / f"{_digest(self._of)[:16]}.json"
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
            found = self._read() | self._new
            write_json(self._path, {"of": self._of, "found": found, "sha256": _digest(found)})
        except (CapacityError, ConfigError) as error:  # a load must not fail because a home is read-only
            return f"the trial is repeated at every load: {error}"
        return None

    def _read(self) -> dict[str, Any]:
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # nothing kept yet, or nothing that can be read: tried again, and replaced
            return {}
        own = isinstance(table, dict) and table.get("of") == self._of
        kept = table.get("found") if own else None
        return kept if isinstance(kept, dict) and table.get("sha256") == _digest(kept) else {}


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
