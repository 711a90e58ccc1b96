"""`kangaroo import`: from a folder that another project wrote to one that a drafter of this library loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kangaroo.decoder import Decoder
from kangaroo.documents import Document, read_documents
from kangaroo.drafters.eagle3.head import Eagle3Head
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.exit_calibration import ExitCalibration
from kangaroo.errors import AdapterError, ConfigError, DataError
from kangaroo.exchange.checkpoint import Checkpoint, read_checkpoint, read_config
from kangaroo.exchange.eagle3 import is_eagle3, make_head
from kangaroo.exchange.fitting import fit_calibration
from kangaroo.exchange.official import make_adapter
from kangaroo.files import need_new, new_folder
from kangaroo.machine import versions
from kangaroo.model import check_exit_layer

Load = Callable[[str], Decoder]
"""Loads a target by a name or folder, with its tokenizer."""
Advance = Callable[[int, int], object]
"""Told how many answers of how many have been written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be imported, for which target, and where to."""

    folder: Path
    output: Path
    target: str | None = None
    """A folder or hub name; a whole model is its own."""
    exit_layer: int | None = None
    taps: tuple[int, int, int] | None = None
    data: Sequence[Path] = ()
    """Text for the target to answer, so that confidences can be calibrated."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What was made of it."""

    kind: str
    use: str
    """The options that draft with it."""
    notes: list[str] = field(default_factory=list)
    """What its user should know."""


def import_folder(wanted: Wanted, load: Load, advance: Advance = lambda done, total: None) -> Imported:
    """Find out what a folder holds, and write what a drafter loads to a new one; nothing is written if that fails.

    Raises AdapterError for a folder that holds nothing known, or does not belong to the target; ConfigError for
    options that are missing or do not apply; DataError for text that cannot be used.
    """
    need_new(wanted.output)
    config = read_config(wanted.folder)
    if not is_eagle3(config) and config.get("num_hidden_layers", int, 1) > 1:
        return _import_model(wanted, load, advance)
    found = read_checkpoint(wanted.folder)
    if wanted.target is None:
        raise ConfigError("say which model it drafts for: --target, a folder or hub name")
    if is_eagle3(config, found.tensors):
        _refuse(wanted, "EAGLE-3 head", exit_layer=wanted.exit_layer, data=wanted.data or None)
        return _import_head(wanted, found, load(wanted.target))
    if "layers.0.self_attn.q_proj.weight" not in found.tensors:
        raise AdapterError(
            f"nothing that is known in {found.path}: expected an adapter of the Kangaroo release, an EAGLE-3 head or a "
            f"whole model, got {len(found.tensors)} tensors such as {min(found.tensors)!r}"
        )
    _refuse(wanted, "adapter", taps=wanted.taps)
    return _import_adapter(wanted, found, load, advance)


def _refuse(wanted: Wanted, kind: str, **given: object) -> None:
    """Raise ConfigError for an option that another kind of checkpoint takes."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{wanted.folder} holds an {kind}: --{name.replace('_', '-')} does not apply to it")


def _import_head(wanted: Wanted, found: Checkpoint, decoder: Decoder) -> Imported:
    head = make_head(found, decoder.target, wanted.taps)
    with new_folder(wanted.output) as folder:
        head.save(folder, _provenance(wanted, found.sha256))
        Eagle3Head.load(folder, decoder.target)  # what cannot be loaded is not to be left there
    return Imported("EAGLE-3 head", f"--drafter eagle3 --eagle3 {wanted.output}")


def _import_adapter(wanted: Wanted, found: Checkpoint, load: Load, advance: Advance) -> Imported:
    assert wanted.target is not None
    if wanted.exit_layer is None:
        raise ConfigError(
            "an adapter's file does not say its exit layer; give --exit-layer (the published ones leave after 2 layers "
            "of Vicuna-7B and after 3 of Vicuna-13B)"
        )
    documents, decoder = _documents(wanted), load(wanted.target)
    adapter, notes = make_adapter(found, decoder.target, wanted.exit_layer)
    with new_folder(wanted.output) as folder:
        adapter.save(folder, _provenance(wanted, found.sha256))
        ready = Adapter.load(folder, decoder.target)
        if documents:
            fit_calibration(decoder, documents, adapter.config.exit_layer, ready, advance).save(folder)
        else:
            notes.append("without --data its confidence is not calibrated: drafting stops by a threshold")
    return Imported("Kangaroo adapter", f"--adapter {wanted.output}", notes)


def _import_model(wanted: Wanted, load: Load, advance: Advance) -> Imported:
    """A checkpoint trained for early exit needs nothing but a calibration (LayerSkip, Elhoushi et al. 2024)."""
    _refuse(wanted, "whole model", taps=wanted.taps)
    if wanted.target is not None and Path(wanted.target).resolve() != wanted.folder.resolve():
        raise ConfigError(f"{wanted.folder} holds a whole model, which is its own target: leave --target out")
    if wanted.exit_layer is None:
        raise ConfigError(
            "a checkpoint does not say where to leave it early; give --exit-layer (LayerSkip's 7B model: 8 of 32)"
        )
    documents = _documents(wanted)
    if not documents:
        raise ConfigError("early exit needs no files but a calibration; give text to fit it on: --data FILE")
    decoder = load(str(wanted.folder))
    check_exit_layer(wanted.exit_layer, decoder.target)
    calibration = fit_calibration(decoder, documents, wanted.exit_layer, None, advance)
    with new_folder(wanted.output) as folder:
        ExitCalibration(wanted.exit_layer, calibration).save(folder, decoder.target, _provenance(wanted))
    use = f"--model {wanted.folder} --drafter early-exit --set calibration={wanted.output} --set stop=auto"
    return Imported("calibration of early exit", use)


def _documents(wanted: Wanted) -> list[Document]:
    documents = [document for path in wanted.data for document in read_documents(path)]
    if wanted.data and not documents:
        raise DataError(f"there is no text in {', '.join(map(str, wanted.data))}")
    return documents


def _provenance(wanted: Wanted, sha256: str | None = None) -> dict[str, Any]:
    """Where it came from; of the data only the names."""
    return {
        "imported_from": wanted.folder.resolve().name,
        "weights_sha256": sha256,
        "target": wanted.target or wanted.folder.resolve().name,
        "calibrated_on": [path.name for path in wanted.data],
        "versions": versions(),
    }
