"""Benchmark recipes: TOML files that say which methods answer, how they sample, and how they are timed."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator

from kangaroo.bench.records import BASELINE
from kangaroo.drafters import find_drafter
from kangaroo.sampling import Sampling
from kangaroo.toml import Count, Positive, Section, Weight, parse_table, read_table


class SamplingSection(Section):
    """Of every answer; `sampling.py` has their meaning."""

    temperature: Weight = 0.0
    top_k: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class MethodSection(Section):
    """One way to answer. Keys that are not named here are settings of its drafter, or of its peer."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    """What records and tables call it; the name of a file of answers too."""
    kind: Literal["drafter", "transformers"] = "drafter"
    """A drafter in this library's loop, or transformers' own generate."""
    drafter: str | None = None
    """For kind "drafter": its name in DRAFTERS."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is said beyond name, kind and drafter."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.name):
            raise ValueError(f"a method's name is letters, digits and any of ._+-, got {self.name!r}")
        if self.name == BASELINE:
            raise ValueError(f"{BASELINE!r} is the baseline, which always runs; leave it out of the methods")
        if (self.kind == "drafter") != (self.drafter is not None):
            raise ValueError(f'{self.name}: kind "drafter" needs a drafter, and kind "transformers" has none')
        if self.drafter is not None:
            find_drafter(self.drafter)
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
    max_tokens: Positive = 128
    end: Literal["natural", "barred"] = "natural"
    """Do answers end by themselves, or is every end barred, so that each has exactly max_tokens?"""
    repeats: Positive = 1
    batch: Positive = 1
    """Questions answered together; the rows of a batch share its seconds equally."""
    threads: Positive | None = None
    """Of the CPU; left out: as many as torch takes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Precision the model is loaded in; auto is what `kangaroo generate` would choose."""
    seed: Count = 0
    sampling: SamplingSection = SamplingSection()
    methods: tuple[MethodSection, ...] = ()
    """Beside the baseline, plain decoding in the same loop, which is always there and first."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """As `load` takes it."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def sampled(self, repeat: int) -> Sampling:
        """How the answers of a repeat are sampled: each repeat is another sample of the same seed."""
        return Sampling(**self.sampling.model_dump(), seed=self.seed, index=repeat)

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        self.sampled(0)
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


def read_bench_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> BenchRecipe:
    """Read a recipe; `overrides` replace values of the file by dotted key. Raises ConfigError naming the key."""
    return parse_table(BenchRecipe, read_table(path, overrides), str(path))
