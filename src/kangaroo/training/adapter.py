"""An adapter run: the adapter of the recipe, taught to imitate the target."""

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file

from kangaroo import demo
from kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.draft_vocabulary import count_tokens
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.training.corpus import Corpus
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.frozen import train_for_target
from kangaroo.training.imitation import Imitation
from kangaroo.training.recipe import AdapterRecipe
from kangaroo.training.report import Report

FRESH = ("target", "random")
"""Starts that are no trained adapter."""


def train_adapter(recipe: AdapterRecipe, paths: Sequence[Path], report: Report, *, resume: bool) -> Path:
    """Train an adapter for the recipe's target; returns the folder of the best one."""
    return train_for_target(recipe, paths, report, lambda target: begin_adapter(target, recipe), resume=resume)


def begin_adapter(target: Target, recipe: AdapterRecipe) -> Callable[[HeldOut, Corpus], Imitation]:
    """The adapter, and its objective when there is text: a draft vocabulary is chosen by what is learnt from."""
    adapter = new_adapter(target, recipe)

    def make_objective(held_out: HeldOut, corpus: Corpus) -> Imitation:
        if adapter.vocabulary is not None and recipe.adapter.init in FRESH:
            adapter.vocabulary.choose(count_tokens(corpus.tokens[corpus.trained], target.vocab_size))
        return Imitation(target, adapter, held_out, recipe)

    return make_objective


def new_adapter(target: Target, recipe: AdapterRecipe) -> Adapter:
    """The adapter as training begins.

    Raises ConfigError if the target has no such layer, or none to start from, or if a trained adapter is of another
    shape than the recipe's; AdapterError if there is none, or it belongs to another target.
    """
    config = AdapterConfig(
        exit_layer=recipe.adapter.exit_layer,
        variant=recipe.adapter.variant,
        layers=recipe.adapter.layers,
        draft_vocabulary=recipe.adapter.draft_vocabulary,
        max_draft=recipe.evaluation.max_draft,
        threshold=recipe.evaluation.threshold,
    )
    adapter = Adapter(target, config)
    init = recipe.adapter.init
    if init in FRESH:
        adapter.initialise(recipe.seed, from_target=init == "target")
    else:
        _take_over(adapter, demo.ADAPTER if init == "demo" else Path(init))
    return adapter


def _take_over(adapter: Adapter, folder: Path) -> None:
    trained = Adapter.load(folder, adapter.target)
    for name in ("exit_layer", "variant", "layers", "draft_vocabulary"):
        wanted, found = getattr(adapter.config, name), getattr(trained.config, name)
        if wanted != found:
            raise ConfigError(
                f"adapter.{name} is {wanted!r}, but the adapter that adapter.init names has {found!r}; say the same, "
                'or start from the target (adapter.init = "target")'
            )
    # From the file once more: what was loaded has the target's precision, which may be lower than that of training.
    adapter.load_state_dict(load_file(folder / Adapter.file))
