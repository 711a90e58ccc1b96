"""The calibration of early exit: what the confidence behind one layer of one target is worth, as a folder of two files.

An adapter has its calibration beside it. Early exit has nothing to keep it beside, so the folder says whose it is.
"""

from pathlib import Path
from typing import Any, NamedTuple

from kangaroo.checks import need_whole
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.files import write_json
from kangaroo.fingerprint import same_model
from kangaroo.inputs import is_file, name_path, read_object
from kangaroo.model import Target, check_exit_layer

OWNER = "early_exit.json"


class ExitCalibration(NamedTuple):
    """Where to exit, and what confidence is worth there."""

    exit_layer: int
    calibration: Calibration

    def save(self, folder: Path, target: Target, provenance: dict[str, Any]) -> None:
        """Write calibration.json, and what says whose it is."""
        self.calibration.save(folder)
        table = {"exit_layer": self.exit_layer, "target_fingerprint": target.fingerprint, "provenance": provenance}
        write_json(folder / OWNER, table)

    @classmethod
    def load(cls, folder: Path, target: Target, *, allow_other_target: bool = False) -> "ExitCalibration":
        """Read them. Raises AdapterError for a folder that is damaged, is none of these, or is of another target."""
        path = folder / OWNER
        if not is_file(path):
            raise AdapterError(f"no calibration of early exit in {name_path(folder)}: `kangaroo import` makes them")
        table = read_object(path, OWNER, AdapterError)
        wanted = table.get("target_fingerprint")
        try:
            exit_layer = need_whole("exit_layer", table.get("exit_layer"))
            check_exit_layer(exit_layer, target)
        except ConfigError as error:
            raise AdapterError(f"{path} is damaged, or of another target: {error}") from None
        if not isinstance(wanted, str):
            raise AdapterError(f"{path} is damaged: 'target_fingerprint' should be of type str")
        known = same_model(wanted, target.fingerprint, weights_hidden=target.hides_weights)
        if not (known or allow_other_target):
            raise AdapterError(
                f"the calibration in {folder} is of another target (fingerprint {wanted}, this target has "
                f"{target.fingerprint}); make one with `kangaroo import`, or, if it is a relative of the other, say "
                "allow_other_target=True"
            )
        return cls(exit_layer, Calibration.load(folder))
