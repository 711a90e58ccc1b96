"""What a run's records come from, written beside them; and whether a run may go on where it stopped."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kangaroo import demo
from kangaroo.bench.recipe import BenchRecipe
from kangaroo.bench.records import RECORDS
from kangaroo.decoder import Decoder
from kangaroo.errors import ConfigError, DataError
from kangaroo.inputs import is_file, is_folder
from kangaroo.machine import surroundings
from kangaroo.sealed import read_sealed, write_sealed
from kangaroo.toml import parse_table

PROVENANCE = "provenance.json"
FIXED = ("questions", "fingerprint", "files", "dtype", "device", "threads", "versions", "machine")
"""Facts that must be the same when a run goes on. A new commit is noted instead."""
FREE = frozenset({"output", "model", "questions", "training", "limit", "experiment"})
"""Keys of the recipe that may change all the same: names of things that are compared by content, and what is said of
the figures, not what they are."""
FREE_OF_METHODS = ("train", "at", "series")
"""Keys of its methods likewise."""

Facts = dict[str, Any]


def describe_run(recipe: BenchRecipe, decoder: Decoder, questions: bytes, trained: Mapping[str, Path]) -> Facts:
    """The facts of a run that starts now; `questions` is their file's content, `trained` as in `run_bench`."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.model_dump(mode="json"),
        "questions": hashlib.sha256(questions).hexdigest(),
        "fingerprint": decoder.target.fingerprint,
        "files": _files(recipe, decoder, trained),
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "device": str(decoder.target.device),
        "exactness": asdict(decoder.target.exactness),
        "resumed": [],
        **surroundings(),
    }


def find_run(folder: Path, facts: Facts) -> Facts | None:
    """The facts of the run that has started in a folder, if one has.

    Raises ConfigError unless `facts` are of the same run, and for records that nothing is known of; DataError for a
    damaged file.
    """
    path = folder / PROVENANCE
    if not is_file(path):
        if (folder / RECORDS).exists():
            raise ConfigError(f"{folder} holds records but no {PROVENANCE}; give a new --output")
        return None
    before = read_sealed(path, PROVENANCE, DataError)
    missing = [name for name in ("recipe", "started", "resumed", *FIXED) if name not in before]
    if missing or not isinstance(before["recipe"], dict) or not isinstance(before["resumed"], list):
        what = f"it does not say the run's {missing[0]}" if missing else "its recipe is no table, or resumed no list"
        raise DataError(f"{path} is damaged ({what}); restore it, or give a new --output")
    _refuse_another_run(before, facts, path)
    return before


def resumed(before: Facts, facts: Facts) -> Facts:
    """The facts of a run that goes on, with a note of when and at which commit."""
    note = {"at": facts["started"], "commit": facts["commit"], "dirty": facts["dirty"]}
    return before | {"resumed": [*before["resumed"], note]}


def write_facts(folder: Path, facts: Facts) -> None:
    """Write them down."""
    write_sealed(folder / PROVENANCE, facts)


def _refuse_another_run(before: Facts, now: Facts, path: Path) -> None:
    # Parsed again, so that a key that did not exist when the run started counts as having had its default.
    recipe = _compared(parse_table(BenchRecipe, before["recipe"], str(path)).model_dump(mode="json"))
    pairs = [(f"recipe's {key}", recipe[key], value) for key, value in _compared(now["recipe"]).items()]
    pairs += [(name, before[name], now[name]) for name in FIXED]
    for name, was, is_ in pairs:
        if was != is_:
            raise ConfigError(
                f"{path.parent} holds another run: its {name} was {_shown(was, is_)}, now it is {_shown(is_, was)}; "
                "restore it to go on, or give a new --output"
            )


def _compared(recipe: Facts) -> Facts:
    methods = [{k: v for k, v in method.items() if k not in FREE_OF_METHODS} for method in recipe["methods"]]
    return {key: value for key, value in recipe.items() if key not in FREE} | {"methods": methods}


def _shown(value: Any, other: Any) -> str:
    """A value, of a mapping only the first entry that the other one has not."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = next(({key: value.get(key)} for key in {**value, **other} if value.get(key) != other.get(key)), value)
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _files(recipe: BenchRecipe, decoder: Decoder, trained: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of what each method was trained or built with, by method, where it lies on this disk."""
    digests = {}
    for method in recipe.methods:
        key = method.files
        named = trained.get(method.name, method.settings.get(key, decoder.files.get(key)) if key else None)
        path = None if named is None else demo.find_adapter(named)
        if path is not None and (is_file(path) or is_folder(path)):
            digests[method.name] = digest(path)
    return digests


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(file.relative_to(path).as_posix().encode())
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()
