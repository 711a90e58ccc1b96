"""From a benchmark recipe to a folder of records: all methods on all questions, interleaved, in one process.

A sweep is one run per value of a key, one after the other, on a model that is loaded once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kangaroo import demo
from kangaroo.bench.answers import write_answers
from kangaroo.bench.asking import Asker
from kangaroo.bench.cost import method_costs, trained_parameters
from kangaroo.bench.drafted import Drafted
from kangaroo.bench.formats import fetch, read_questions
from kangaroo.bench.journal import Journal
from kangaroo.bench.methods import Method
from kangaroo.bench.peers import make_peer
from kangaroo.bench.provenance import Facts, describe_run, find_run, resumed, write_facts
from kangaroo.bench.questions import Question, in_running_order
from kangaroo.bench.recipe import BenchRecipe
from kangaroo.bench.records import BASELINE, Record
from kangaroo.decoder import Decoder, load
from kangaroo.drafters import find_drafter
from kangaroo.errors import ConfigError, DataError
from kangaroo.files import claim
from kangaroo.inputs import is_file
from kangaroo.sealed import read_sealed, write_sealed

BenchReport = Callable[[int, int], None]
"""Is told how many questions of how many have been answered by all methods, repeats counted."""


@dataclass(frozen=True, slots=True)
class Block:
    """Questions that are answered as one batch, in one repeat."""

    questions: Sequence[Question]
    repeat: int
    rotation: int
    """How far the order of the methods is turned: by one from block to block, and from repeat to repeat."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The target of a run, and what drafts for it by method."""

    plain: Decoder
    drafting: dict[str, Decoder]
    trained: Mapping[str, Path]


def run_bench(
    recipe: BenchRecipe,
    *,
    trained: Mapping[str, Path] | None = None,
    limit: int | None = None,
    report: BenchReport = lambda done, total: None,
) -> list[Record]:
    """Measure what the recipe describes, on at most `limit` of its questions; returns all records in its folder.

    `trained` are the folders of methods that were trained first (`train_methods`), by name. What the output folder
    holds already is not measured again, so the same call goes on after an interruption, and a larger limit adds to a
    smaller one's records. An error in a method ends the run; what was recorded before stays.

    Raises ConfigError for settings that cannot be and for a folder of another run, DataError for the questions.
    """
    assert recipe.vary is None, "run_sweep makes a run per value"
    return measure(recipe, load_methods(recipe, trained), limit=limit, report=report)


def load_methods(recipe: BenchRecipe, trained: Mapping[str, Path] | None = None) -> Loaded:
    """The model and everything that drafts for it. Raises ConfigError, ModelError, AdapterError or DataError."""
    trained = trained or {}
    untrained = [method.name for method in recipe.methods if method.train and method.name not in trained]
    assert not untrained, f"{untrained} must be trained first"
    if recipe.threads is not None:  # before the load, whose trial holds for so many threads only
        torch.set_num_threads(recipe.threads)
    named: dict[str, Any] = dict(recipe.files)
    plain = load(recipe.model, drafter="none", dtype=recipe.torch_dtype, compile=recipe.compile, **named)
    drafting = {}
    for method in recipe.methods:
        if method.drafter is not None:
            files = find_drafter(method.drafter).files
            own = {files: trained[method.name]} if files and method.name in trained else {}
            drafting[method.name] = plain.with_drafter(method.drafter, **method.settings, **own)
    return Loaded(plain, drafting, trained)


def measure(
    recipe: BenchRecipe, loaded: Loaded, *, limit: int | None = None, report: BenchReport = lambda done, total: None
) -> list[Record]:
    """As `run_bench`, with methods that are loaded already."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    source = str(demo.PROMPTS) if recipe.questions == "demo" else recipe.questions
    content = fetch(source)
    everything = in_running_order(read_questions(content, source, recipe.split))
    questions = everything[: limit or recipe.limit]
    decoder = loaded.plain
    asker = Asker(decoder, _methods(recipe, loaded), recipe, everything)
    with claim(recipe.output):
        facts = describe_run(recipe, decoder, content, loaded.trained)
        before = find_run(recipe.output, facts)
        if before is None:
            facts["costs"] = _costs(loaded.drafting)
            facts["parameters"] = {name: trained_parameters(mine) for name, mine in loaded.drafting.items()}
            write_facts(recipe.output, facts)
        with closing(Journal(recipe.output, [BASELINE, *(method.name for method in recipe.methods)])) as journal:
            blocks = list(_blocks(recipe, questions, journal))
            if before is not None and blocks:
                write_facts(recipe.output, resumed(before, facts))
            _measure(asker, blocks, journal, len(questions) * recipe.repeats, report)
            write_answers(recipe.output, journal.records, decoder.tokenizer, (before or facts)["started"])
            return journal.records


def _methods(recipe: BenchRecipe, loaded: Loaded) -> dict[str, Method]:
    methods: dict[str, Method] = {BASELINE: Drafted(loaded.plain)}
    for method in recipe.methods:
        if method.name in loaded.drafting:
            methods[method.name] = Drafted(loaded.drafting[method.name], method.rule)
        else:
            methods[method.name] = make_peer(loaded.plain, method.settings, recipe.batch)
    return methods


def _blocks(recipe: BenchRecipe, questions: Sequence[Question], journal: Journal) -> Iterator[Block]:
    """What is still to be done. Repeats come one after the other, so that every question is met early."""
    for repeat in range(recipe.repeats):
        for first in range(0, len(questions), recipe.batch):
            batch = questions[first : first + recipe.batch]
            missing = [question for question in batch if not journal.has(question.id, repeat)]
            if missing:
                yield Block(missing, repeat, first // recipe.batch + repeat)


def _measure(asker: Asker, blocks: Sequence[Block], journal: Journal, total: int, report: BenchReport) -> None:
    done = total - sum(len(block.questions) for block in blocks)
    report(done, total)
    for block in blocks:
        journal.append(asker.ask(block.questions, block.repeat, block.rotation))
        done += len(block.questions)
        report(done, total)


def _costs(drafting: dict[str, Decoder]) -> Facts:
    """What drafting costs, by method, for those whose rounds can be priced."""
    found = {name: method_costs(decoder) for name, decoder in drafting.items()}
    return {name: costs.model_dump(mode="json") for name, costs in found.items() if costs is not None}


SWEEP = "sweep.json"


def run_sweep(
    recipe: BenchRecipe,
    *,
    trained: Mapping[str, Path] | None = None,
    limit: int | None = None,
    watch: Callable[[str], AbstractContextManager[BenchReport]],
) -> dict[str, list[Record]]:
    """Measure a recipe at every value of its [vary] section, as `run_bench` does at one; returns records by value.

    The run of a value lies in OUTPUT/VALUE; sweep.json says which there are. `watch` is entered for each of them, with
    its name, and gives what is told of its progress.
    """
    assert recipe.vary is not None, "run_bench makes a single run"
    runs = recipe.by_value()
    with claim(recipe.output):
        _write_sweep(recipe.output, recipe.vary.key, list(recipe.vary.values))
        methods = load_methods(recipe, trained)
        records = {}
        for value, run in runs.items():
            with watch(f"{recipe.vary.key} = {value}") as report:
                records[value] = measure(run, methods, limit=limit, report=report)
    return records


def _write_sweep(folder: Path, key: str, values: list[Any]) -> None:
    before = read_sweep(folder)
    if before is not None and before[0] != key:
        raise ConfigError(f"{folder} holds a sweep over {before[0]}, not over {key}; give a new --output")
    write_sealed(folder / SWEEP, {"key": key, "values": values})


def read_sweep(folder: Path) -> tuple[str, list[Any]] | None:
    """(key, values) of the sweep in a folder; None if there is none. Raises DataError for a damaged file."""
    path = folder / SWEEP
    if not is_file(path):
        return None
    table = read_sealed(path, SWEEP, DataError)
    if not isinstance(table.get("key"), str) or not isinstance(table.get("values"), list):
        raise DataError(f"{path} is damaged: it should hold a key and its values; run `kangaroo bench` to renew it")
    return table["key"], table["values"]
