"""Benchmark recipes: TOML files that say which methods answer, how they sample, and how they are timed."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator

from kangaroo import demo
from kangaroo.accept import RULES
from kangaroo.bench.experiment import NAME, ExperimentSection, TrainingSection, TrainSection, VarySection
from kangaroo.bench.records import BASELINE
from kangaroo.drafters import FILES, find_drafter
from kangaroo.errors import ConfigError
from kangaroo.machine import MOST_THREADS
from kangaroo.sampling import Sampling
from kangaroo.toml import Count, Positive, Section, lay_over, parse_table, read_table


class SamplingSection(Section):
    """Of every answer; `sampling.py` has the meaning of its keys, and what they may be."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        try:
            Sampling(**self.model_dump())
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class MethodSection(Section):
    """One way to answer. Keys that are not named here are settings of its drafter, or of its peer."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    """What records and tables call it; the name of a file of answers too."""
    kind: Literal["drafter", "transformers"] = "drafter"
    """A drafter in this library's loop, or transformers' own generate."""
    drafter: str | None = None
    """For kind "drafter": its name in DRAFTERS."""
    rule: str = "match"
    """For kind "drafter": which drafted tokens survive (`accept.py`). By "reject" texts are not plain decoding's."""
    optional: bool = False
    """Leave it out, and say so, where the file or folder that it names is not there; otherwise that is an error."""
    train: TrainSection | None = None
    """Train what it drafts with before measuring."""
    at: float | str | None = None
    """Its place on the experiment's axis; left out: its name."""
    series: str | None = None
    """The line of the experiment that it belongs to; left out: its drafter's name."""

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its drafter or peer."""
        return dict(self.model_extra or {})

    @property
    def files(self) -> str | None:
        """The setting that names what it loads, if it loads anything of its own."""
        return find_drafter(self.drafter).files if self.drafter is not None else "draft_model"

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a method's name is letters, digits and any of ._+-, got {self.name!r}")
        if self.name == BASELINE:
            raise ValueError(f"{BASELINE!r} is the baseline, which always runs; leave it out of the methods")
        if (self.kind == "drafter") != (self.drafter is not None):
            raise ValueError(f'{self.name}: kind "drafter" needs a drafter, and kind "transformers" has none')
        if self.rule not in RULES:
            raise ValueError(f"{self.name}: rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        files = self.files if self.drafter is not None else None
        if self.optional and self.settings.get(self.files or "") is None:
            raise ValueError(f"{self.name}: optional is for a method that names the file or folder it loads")
        if self.train is not None and files is None:
            raise ValueError(f"{self.name}: {self.drafter or self.kind} is not trained; leave train out")
        if self.train is not None and files in self.settings:
            raise ValueError(f"{self.name}: train says where {files} comes from; leave one of the two out")
        return self


class BenchRecipe(Section):
    """All that a benchmark's figures depend on, but the machine."""

    model: str
    """"demo", a folder, or a hub name."""
    questions: str = "demo"
    """A file or an http(s) address; "demo" for the evaluation prompts that ship with the project."""
    split: str | None = None
    """Only this part of a file that has parts."""
    output: Path
    """Folder of the run."""
    limit: Positive | None = None
    """At most so many questions, evenly from all tasks."""
    prompt_tokens: Positive | None = None
    """Bring every prompt to so many tokens: cut what is longer, put other questions before what is shorter."""
    max_tokens: Positive = 128
    end: Literal["natural", "barred"] = "natural"
    """Do answers end by themselves, or is every end barred, so that each has exactly max_tokens?"""
    repeats: Positive = 1
    batch: Positive = 1
    """Questions answered together; the rows of a batch share its seconds equally."""
    threads: Annotated[int, Field(gt=0, le=MOST_THREADS)] | None = None
    """Of the CPU; left out: as many as torch takes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Precision the model is loaded in; auto is what `kangaroo generate` would choose."""
    compile: bool = False
    """Compute by kernels compiled for this CPU, plain decoding too."""
    seed: Count = 0
    files: dict[str, str] = Field(default_factory=dict)
    """What the drafters of a model load, by the name of their setting, where a method names none: adapter, heads,
    eagle3, draft_model, datastore. The demo model brings its own."""
    sampling: SamplingSection = SamplingSection()
    methods: tuple[MethodSection, ...] = ()
    """Beside the baseline, plain decoding in the same loop, which is always there and first."""
    training: TrainingSection | None = None
    """For methods that are trained before they are measured."""
    vary: VarySection | None = None
    """Make one run per value of a key."""
    experiment: ExperimentSection | None = None
    """What the figures show together."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """As `load` takes it."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def drawn(self) -> set[str]:
        """Methods that draw texts of their own, which are not compared with plain decoding's."""
        return {method.name for method in self.methods if method.rule != "match"}

    def sampled(self, repeat: int) -> Sampling:
        """How the answers of a repeat are sampled: each repeat is another sample of the same seed."""
        return Sampling(**self.sampling.model_dump(), seed=self.seed, index=repeat)

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        self.sampled(0)
        unknown = [name for name in self.files if name not in FILES]
        if unknown:
            raise ValueError(f"no drafter loads {unknown[0]!r}; [files] may name {', '.join(FILES)}")
        twice = [name for name, count in Counter(method.name for method in self.methods).items() if count > 1]
        if twice:
            raise ValueError(f"two methods are called {twice[0]!r}; every method needs a name of its own")
        peers = [method.name for method in self.methods if method.kind == "transformers"]
        if peers and self.sampling != SamplingSection():
            raise ValueError(
                f"{peers[0]}: transformers draws with noise of its own, so its texts can be compared greedily only; "
                "leave [sampling] out, or the method"
            )
        return self

    @model_validator(mode="after")
    def _an_experiment(self) -> Self:
        for place, method in enumerate(self.methods):
            if self.experiment is None and (method.at, method.series) != (None, None):
                raise ValueError(f"{method.name}: at and series are places in an [experiment], which is missing")
            if method.at is not None and self.vary is not None:
                raise ValueError(f"{method.name}: [vary] gives every method its place; leave at out")
            earlier = {other.name for other in self.methods[:place] if other.train}
            if method.train is not None and method.train.after not in {None, *earlier}:
                raise ValueError(
                    f"{method.name}: train.after is {method.train.after!r}; name a method trained before it"
                )
            if method.train is not None and not (method.train.recipe or (self.training and self.training.recipe)):
                raise ValueError(f"{method.name}: nothing says what to train it by; give training.recipe")
        projected = self.experiment.projected if self.experiment else None
        if projected is not None and (self.vary or projected not in {method.name for method in self.methods}):
            raise ValueError(
                f"experiment.projected names one of the methods of a recipe without [vary], got {projected!r}"
            )
        if self.training is not None and not any(method.train for method in self.methods):
            raise ValueError("[training], or --data, is for methods that are trained, and no method has a train")
        self.by_value()
        return self

    def without_missing(self) -> "tuple[BenchRecipe, dict[str, str]]":
        """Without the optional methods whose files are not there, and what each of these lacks, by name."""
        lacking = {}
        for method in self.methods:
            if method.optional and method.files is not None:
                path = demo.find_adapter(str(method.settings[method.files]))
                if not path.exists():
                    lacking[method.name] = f"no {method.files} in {path}"
        kept = tuple(method for method in self.methods if method.name not in lacking)
        return self.model_copy(update={"methods": kept}), lacking

    def by_value(self) -> "dict[str, BenchRecipe]":
        """The runs of a sweep by the value of what varies, which names their folders too; none if nothing does.

        Raises ConfigError for a key that does not exist, or a value that it cannot have.
        """
        runs: dict[str, BenchRecipe] = {}
        for value in self.vary.values if self.vary else ():
            assert self.vary is not None
            table = self.model_dump(mode="json", exclude={"vary"})
            lay_over(table, {self.vary.key: value, "output": str(self.output / str(value))})
            runs[str(value)] = parse_table(BenchRecipe, table, f"vary, {value}")
        return runs


def read_bench_recipe(path: Path, overrides: Mapping[str, Any] | None = None, *, quick: bool = False) -> BenchRecipe:
    """Read a recipe; `overrides` replace values of the file by dotted key. Raises ConfigError naming the key.

    The values in its [quick] section, likewise by dotted key, replace others only if `quick`, and before `overrides`.
    """
    table = read_table(path)
    little = table.pop("quick", None)
    if quick:
        if not isinstance(little, dict):
            raise ConfigError(f"{path} has no [quick] section, which says what a quick run leaves out; run it as it is")
        lay_over(table, little)
    lay_over(table, overrides or {})
    return parse_table(BenchRecipe, table, str(path))
