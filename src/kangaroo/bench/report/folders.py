"""Folders that a report is made of: single runs, sweeps of several, and the experiments they are part of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kangaroo.bench.report.experiment import Experiment, Place, make_experiment
from kangaroo.bench.report.results import Run, read_runs
from kangaroo.bench.run import read_sweep


@dataclass(frozen=True, slots=True)
class Reported:
    """All that a report speaks of."""

    experiments: list[Experiment]
    runs: list[Run]


def read_folders(folders: Sequence[Path], *, count: bool = False, against: str | None = None) -> Reported:
    """Runs and experiments of folders, a sweep's folder standing for the runs in it. Raises as `read_runs`."""
    groups = [_expand(folder) for folder in folders]
    runs = read_runs([folder for group in groups for _, _, folder in group], count=count, against=against)
    found = iter(runs)
    experiments, named = [], list[Run]()
    for group in groups:
        mine: list[tuple[Place | None, Run]] = []
        for name, value, _ in group:
            run = next(found)
            mine.append((value, run if name is None else replace(run, name=name)))
        experiment = make_experiment(mine)
        experiments += [] if experiment is None else [experiment]
        named += [run for _, run in mine]
    return Reported(experiments, named)


def _expand(folder: Path) -> list[tuple[str | None, Place | None, Path]]:
    """(name, value, folder) of each run in a folder; a single run has neither name nor value."""
    sweep = read_sweep(folder)
    if sweep is None:
        return [(None, None, folder)]
    key, values = sweep
    return [(f"{key} = {value}", value, folder / str(value)) for value in values]
