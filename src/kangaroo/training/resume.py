"""May a run go on from a checkpoint? Only if it is the same run."""

from collections.abc import Mapping
from pathlib import Path

from kangaroo.errors import ConfigError
from kangaroo.training.checkpoint import Progress, read_progress
from kangaroo.training.reading import parse_recipe
from kangaroo.training.recipe import Recipe, flatten

STATE = "state.safetensors"

FREE = frozenset(
    {
        "output",  # the folder was moved
        "states",
        "states_gigabytes",
        "schedule.steps",  # longer or shorter; the decay moves with the end, and what has been learnt stays
        "schedule.decay_steps",  # likewise: a run of unknown length decays when its time comes
        "run.checkpoint_every",
        "run.evaluate_every",
        "run.tensorboard",
        "run.compile",
        "evaluation.batch",
        "regenerate.batch",  # answers do not depend on what they are generated beside
        "synthesis.batch",
    }
)
"""Recipe keys that a resumed run may change."""


def find_progress(recipe: Recipe, identity: Mapping[str, str], *, resume: bool) -> Progress:
    """Where to start: at step 0 in a folder without a run, or with `resume` where the folder's run stopped.

    Raises ConfigError if there is a run and it was not to be resumed, if there is none and it was, or if recipe, data
    or target are not those the run was started with.
    """
    path = recipe.output / STATE
    fresh = Progress(0, None, recipe.model_dump(mode="json"), identity)
    if not path.is_file():
        if resume:
            raise ConfigError(f"nothing to resume: no run has started in {recipe.output}")
        return fresh
    progress = read_progress(path)
    if not resume:
        raise ConfigError(
            f"{recipe.output} holds a run that stopped after step {progress.step}: resume it, choose another output, "
            "or delete the folder"
        )
    _check_same_run(progress, recipe, identity, path)
    return Progress(progress.step, progress.best, fresh.recipe, identity)


def _check_same_run(progress: Progress, recipe: Recipe, identity: Mapping[str, str], path: Path) -> None:
    if progress.recipe is not None:
        if progress.recipe["kind"] != recipe.kind:
            raise ConfigError(f"cannot resume: kind was {progress.recipe['kind']!r}, now it is {recipe.kind!r}")
        # Parsed again, so that a key that did not exist when the run started counts as having had its default.
        old = flatten(parse_recipe(dict(progress.recipe), str(path)).model_dump(mode="json"))
        new = flatten(recipe.model_dump(mode="json"))
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE and old.get(key) != new.get(key):
                raise ConfigError(
                    f"cannot resume: {key} was {old.get(key)!r} when the run started, now it is {new.get(key)!r}; "
                    "restore it, or start a new run in another output folder"
                )
    for name, digest in progress.identity.items():
        if identity.get(name) != digest:
            raise ConfigError(f"cannot resume: the {name} is not the one this run was started with")
    if progress.step > recipe.schedule.steps:
        raise ConfigError(
            f"cannot resume: {progress.step} steps are done, more than schedule.steps = {recipe.schedule.steps}"
        )
