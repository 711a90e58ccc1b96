"""Trained weights that belong to one target: a safetensors file, and a config that names the target and the bytes.

What was trained for one target is useless to another, so nothing is loaded unless its folder proves that it belongs.
"""

import hashlib
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_origin, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kangaroo.checks import need_number
from kangaroo.errors import AdapterError
from kangaroo.files import write_atomically, write_json, writing
from kangaroo.fingerprint import same_model
from kangaroo.inputs import is_file, is_folder, name_path, read_bytes, read_object
from kangaroo.model import Target
from kangaroo.tensors import check_tensors, parse_tensors

CONFIG = "config.json"
KINDS = {
    "adapter.safetensors": "adapter",
    "heads.safetensors": "Medusa heads",
    "eagle3.safetensors": "EAGLE-3 head",
}
"""What each file of weights holds, so that a folder of the wrong kind is recognised."""
LATER = {"later": True}
"""Metadata of a config's field that came after the first files: one without it means the field's default."""
_OF_EVERY_KIND: dict[str, type] = {"width": int, "vocab_size": int, "target_fingerprint": str, "weights_sha256": str}


class TrainedWeights(nn.Module):
    """A module trained for one target, made from that target and a config: a dataclass of numbers and strings."""

    file: ClassVar[str]
    """Name of its weights' file, one of KINDS."""
    config_kind: ClassVar[type[Any]]

    def __init__(self, target: Target, config: Any):
        super().__init__()
        self.config, self._target = config, [target]  # in a list: the target's weights are not this module's

    @property
    def target(self) -> Target:
        """The model it was made for."""
        return self._target[0]

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write weights and config. Whenever this is cut short, the folder holds the old ones or the new ones."""
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        following = _following(folder / self.file)
        write_atomically(following, lambda part: save_file(tensors, part))
        table = {
            **asdict(self.config),
            "width": self.target.width,
            "vocab_size": self.target.vocab_size,
            "target_fingerprint": self.target.fingerprint,
            "weights_sha256": hashlib.sha256(following.read_bytes()).hexdigest(),
            "provenance": provenance,
        }
        write_json(folder / CONFIG, table)
        with writing(folder / self.file):
            following.replace(folder / self.file)

    @classmethod
    def load(
        cls, folder: Path, target: Target, *, allow_other_target: bool = False, dtype: torch.dtype | None = None
    ) -> Self:
        """Read weights that were trained for this target, in `dtype`, or else in the target's precision.

        With `allow_other_target` those of a relative do as well, a fine-tune's base or a requantised copy: shapes must
        fit. Drafts are then worse, the text is still the target's own.

        Raises AdapterError if files are missing, damaged, of another kind or hold NaN, or belong to another target.
        """
        hints = get_type_hints(cls.config_kind)
        own = {field.name: _json_type(hints[field.name]) for field in fields(cls.config_kind)}
        table = _defaults(cls.config_kind) | _read_config(folder, cls.file)
        for name, kind in (own | _OF_EVERY_KIND).items():
            if kind is float and type(table.get(name)) is int:
                table[name] = need_number(name, table[name])  # 1 is as good as 1.0
            if type(table.get(name)) is not kind:
                raise AdapterError(f"{folder / CONFIG} is damaged: {name!r} should be of type {kind.__name__}")
        for name, wanted in (("width", target.width), ("vocab_size", target.vocab_size)):
            if table[name] != wanted:
                raise AdapterError(f"the weights in {folder} have {name} {table[name]}, but the target has {wanted}")
        wanted, got = table["target_fingerprint"], target.fingerprint
        if not allow_other_target and not same_model(wanted, got, weights_hidden=target.hides_weights):
            raise AdapterError(
                f"the {KINDS[cls.file]} in {folder} belong to another target (fingerprint {wanted[:60]!r}, this has "
                f"{got!r}); train for it with `kangaroo train`, or, if it is a relative of the other, say "
                "allow_other_target=True"
            )
        module = cls(target, cls.config_kind(**{name: table[name] for name in own}))
        tensors = _read_weights(folder / cls.file, table["weights_sha256"])
        tensors = module.current_names(tensors)
        check_tensors(tensors, module.state_dict(), folder / cls.file)
        module.load_state_dict(tensors)
        module.check(folder / cls.file)
        return module.to(dtype or target.dtype).eval().requires_grad_(False)

    def current_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file by the names they have today."""
        return tensors

    def check(self, name: object) -> None:
        """Raise AdapterError, naming where they come from, if weights of the right shapes are still not usable."""


def _following(path: Path) -> Path:
    """Where new weights wait until the config that names them has been written."""
    return path.with_name(f".{path.name}.next")


def _json_type(annotation: Any) -> type:
    return str if get_origin(annotation) is Literal else annotation


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Settings that configs from before they existed lack, with the values that they had then."""
    later = [field for field in fields(kind) if field.metadata.get("later")]
    assert all(field.default is not MISSING for field in later)
    return {field.name: field.default for field in later}


def _read_config(folder: Path, file: str) -> dict[str, Any]:
    path = folder / CONFIG
    others = [name for name in KINDS if name != file and is_file(folder / name)]
    if others and not is_file(folder / file):
        raise AdapterError(f"no {KINDS[file]} in {folder}: its {others[0]} says {KINDS[others[0]]}")
    if not is_file(path):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")] if is_folder(folder) else []
        hint = f"{pickles[0].name} is a pickle, which is never loaded" if pickles else "expected config.json"
        raise AdapterError(f"no {KINDS[file]} in {name_path(folder)}: {hint}")
    return read_object(path, CONFIG, AdapterError)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    following = _following(path)
    cut_short = (
        is_file(following) and hashlib.sha256(read_bytes(following, "weights", AdapterError)).hexdigest() == sha256
    )
    content = read_bytes(following if cut_short else path, "weights", AdapterError)
    tensors = parse_tensors(content, path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise AdapterError(f"{path} is damaged: its bytes are not those that config.json was written for")
    return tensors
