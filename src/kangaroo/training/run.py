"""From a recipe and data files to a finished run: load what it needs, train, keep the best."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kangaroo import demo
from kangaroo.drafters.draft_vocabulary import count_tokens
from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.drafters.medusa.heads import MedusaConfig, MedusaHeads
from kangaroo.errors import ConfigError
from kangaroo.files import claim, write_atomically
from kangaroo.inputs import is_file
from kangaroo.loading import load_model, load_tokenizer
from kangaroo.model import Target
from kangaroo.training import ranks
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import Joined, Packed
from kangaroo.training.checkpoint import STATE, find_progress
from kangaroo.training.corpus import Corpus, Given, choose_documents, hash_files, tokenize
from kangaroo.training.evaluation import HeldOut
from kangaroo.training.loop import Trainer
from kangaroo.training.medusa import MedusaObjective
from kangaroo.training.objective import Objective
from kangaroo.training.recipe import (
    AdapterRecipe,
    FrozenTargetRecipe,
    MedusaRecipe,
    Recipe,
    TargetRecipe,
    flatten,
    read_recipe,
)
from kangaroo.training.report import TrainingReport
from kangaroo.training.synthesis import SYNTHESISED, Synthesis
from kangaroo.training.target import NextToken, build_model, train_tokenizer
from kangaroo.training.target_text import REGENERATED, WRITTEN, TargetText

FRESH = ("target", "random")
"""Starts that are no trained adapter."""


def train(
    recipe: Path,
    data: Sequence[Path] = (),
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: TrainingReport = lambda _: None,
) -> Path:
    """Train what the recipe says on the files named, or on text of the target's own; returns the best weights' folder.

    A recipe with a synthesis section takes no `data`; any other takes at least one file.

    `overrides` replace values of the recipe by dotted key ("schedule.steps"). `report` receives a RunEstimate before
    the first step and Updates along the way. With `resume` the run in the recipe's output folder goes on from its last
    checkpoint, to the same weights as if it had never stopped.

    Started by torchrun, the processes train together (`ranks.py`); the first of them reports and writes.

    Raises ConfigError, DataError, ModelError or CapacityError; Interrupted, a KeyboardInterrupt, after Ctrl-C.
    """
    settings = read_recipe(recipe, overrides)
    with joined_for(settings, resume=resume):
        report = report if ranks.is_first() else lambda _: None
        if isinstance(settings, TargetRecipe):
            return train_target(settings, data, report, resume=resume)
        assert isinstance(settings, AdapterRecipe | MedusaRecipe), "read_recipe knows no other kind"
        return train_for_target(settings, data, report, resume=resume)


@contextmanager
def joined_for(recipe: Recipe, *, resume: bool = False) -> Iterator[None]:
    """While entered, the ranks that torchrun started train by a recipe, whose output folder is theirs alone.

    Raises ConfigError if they are of different recipes, too many for a micro-batch, or if the folder is taken.
    """
    with ranks.joined():
        ranks.agree(flatten(recipe.model_dump(mode="json")) | {"--resume": resume})
        schedule = recipe.schedule
        fewest = min(schedule.shape(step)[0] for step in (0, schedule.steps - 1))
        if ranks.count() > fewest:
            raise ConfigError(
                f"{ranks.count()} ranks cannot share micro-batches of {fewest} sequences; raise "
                "schedule.batch_sequences, or start fewer (--nproc_per_node)"
            )
        with claim(recipe.output) if ranks.is_first() else nullcontext():
            yield


TEXTS = (WRITTEN, REGENERATED, SYNTHESISED)
"""What the target writes for a run. Each file says what it was written for, and is replaced where that is another."""


def train_beside(
    recipe: Path,
    data: Sequence[Path],
    others: Sequence[Path],
    *,
    overrides: Mapping[str, Any],
    report: TrainingReport = lambda _: None,
) -> Path:
    """As `train`, from the start or from where the run in the output folder stopped; returns the folder of the best.

    A run that starts takes the texts in the latest of the `others`, folders of trainings, that has them. Where its own
    would be the same, the target need not write them again.
    """
    folder = read_recipe(recipe, overrides).output
    started = is_file(folder / STATE)
    if not started:
        for name in TEXTS:
            found = [other / name for other in others if is_file(other / name)]
            if found and not (folder / name).exists():
                source = found[-1]
                write_atomically(folder / name, lambda part, source=source: shutil.copyfile(source, part))  # type: ignore[misc]
    return train(recipe, data, overrides=overrides, resume=started, report=report)


def train_target(recipe: TargetRecipe, paths: Sequence[Path], report: TrainingReport, *, resume: bool) -> Path:
    """Train a model from scratch, and its tokenizer unless the recipe names one."""
    identity = {"data": hash_files(paths)}
    tokenizer = None if recipe.model.tokenizer is None else take_tokenizer(recipe.model.tokenizer)
    if tokenizer is not None:
        identity["tokenizer"] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    ranks.agree(identity)
    progress = ranks.by_first(lambda: find_progress(recipe, identity, resume=resume))
    tokenizer, learnt, kept = ranks.by_first(lambda: _tokenize_all(recipe, paths, tokenizer))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(recipe.model, tokenizer, recipe.seed).to(device)
    return Trainer(NextToken(model, tokenizer, kept, recipe.run), learnt, recipe, progress).fit(report)


def _tokenize_all(recipe: TargetRecipe, paths: Sequence[Path], tokenizer: Any) -> tuple[Any, Joined, Joined]:
    """(tokenizer, training text, held-out text); the tokenizer is trained if there is none."""
    training, held_out = choose_documents(paths, recipe.data, recipe.seed)
    if tokenizer is None:
        assert recipe.model.vocab_size is not None, "the recipe has one of the two"
        texts = (" ".join(m["content"] for m in d.messages) if d.messages else d.text for d in training)
        tokenizer = train_tokenizer(texts, recipe.model.vocab_size, recipe.model.context)
    learnt, kept = (
        Joined(tokenize(part, tokenizer, assistant_only=recipe.data.assistant_only)) for part in (training, held_out)
    )
    return tokenizer, learnt, kept


def take_tokenizer(name: str) -> Any:
    """The tokenizer of "demo", a folder or a hub name. Raises ModelError or ConfigError."""
    tokenizer = load_tokenizer(name)
    if not tokenizer.is_fast:
        raise ConfigError(f"{name} has no tokenizer.json, which model.tokenizer needs")
    return tokenizer


def train_for_target(
    recipe: AdapterRecipe | MedusaRecipe, paths: Sequence[Path], report: TrainingReport, *, resume: bool
) -> Path:
    """Train what drafts for the recipe's frozen target; returns the folder of the best weights.

    A recipe with a synthesis section takes no `paths`; any other takes at least one.
    """
    if recipe.synthesis is not None and paths:
        raise ConfigError(
            "the recipe's [synthesis] section makes the text itself: drop the data files (--data), or drop the section"
        )
    given = Given(paths) if recipe.synthesis is None else None
    target, tokenizer = load_target(recipe)
    if recipe.schedule.longest > target.context:
        raise ConfigError(
            f"sequences of {recipe.schedule.longest} tokens exceed the target's context of {target.context} "
            "(schedule.sequence_length)"
        )
    # The weights are made at once, so that what cannot be is refused before the target writes anything.
    make_objective: Callable[[HeldOut, Corpus], Objective]
    make_objective = (
        begin_adapter(target, recipe) if isinstance(recipe, AdapterRecipe) else begin_medusa(target, recipe)
    )
    source = given or Synthesis(target, tokenizer, recipe, report)
    identity = {"data": source.digest, "target": target.fingerprint}
    ranks.agree(identity)
    progress = ranks.by_first(lambda: find_progress(recipe, identity, resume=resume))

    def texts() -> tuple[HeldOut, Corpus]:
        training, held_out = choose_documents(source.files(), recipe.data, recipe.seed)
        author = TargetText(target, tokenizer, recipe, report)
        return author.held_out(held_out), author.training(training)

    kept, learnt = ranks.by_first(texts)
    return Trainer(make_objective(kept, learnt), Packed(learnt), recipe, progress).fit(report)


def begin_adapter(target: Target, recipe: AdapterRecipe) -> Callable[[HeldOut, Corpus], AdapterObjective]:
    """The adapter, and its objective when there is text: a draft vocabulary is chosen by what is learnt from."""
    adapter = new_adapter(target, recipe)

    def make_objective(held_out: HeldOut, learnt: Corpus) -> AdapterObjective:
        if adapter.vocabulary is not None and recipe.adapter.init in FRESH:
            adapter.vocabulary.choose(count_tokens(learnt.tokens[learnt.trained], target.vocab_size))
        return AdapterObjective(target, adapter, held_out, recipe)

    return make_objective


def begin_medusa(target: Target, recipe: MedusaRecipe) -> Callable[[HeldOut, Corpus], MedusaObjective]:
    """The heads, and their objective when there is text."""
    heads = new_heads(target, recipe)
    return lambda held_out, _: MedusaObjective(target, heads, held_out, recipe)


def load_target(recipe: FrozenTargetRecipe) -> tuple[Target, Any]:
    """The frozen target and its tokenizer. Raises ModelError if they cannot be loaded."""
    name = recipe.target
    dtype = None if recipe.run.dtype == "auto" else getattr(torch, recipe.run.dtype)
    if dtype is None and not torch.cuda.is_available():
        dtype = torch.float32
    model = load_model(name, dtype).requires_grad_(False)
    return Target(model, exact=False), load_tokenizer(name)


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
        _take_over(adapter, demo.find_adapter(init))
    return adapter


def _take_over(adapter: Adapter, folder: Path) -> None:
    # The target's precision may be lower than that of training.
    trained = Adapter.load(folder, adapter.target, dtype=torch.float32)
    for name in ("exit_layer", "variant", "layers", "draft_vocabulary"):
        wanted, found = getattr(adapter.config, name), getattr(trained.config, name)
        if wanted != found:
            raise ConfigError(
                f"adapter.{name} is {wanted!r}, but the adapter that adapter.init names has {found!r}; say the same, "
                'or start from the target (adapter.init = "target")'
            )
    adapter.load_state_dict(trained.state_dict())


def new_heads(target: Target, recipe: MedusaRecipe) -> MedusaHeads:
    """The untrained heads."""
    heads = MedusaHeads(target, MedusaConfig(heads=recipe.medusa.heads))
    heads.initialise(recipe.seed, from_target=recipe.medusa.init == "target")
    return heads
