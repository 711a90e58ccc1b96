"""Benchmark recipes say what they mean, and their errors say what to change."""

from pathlib import Path
from typing import Any

import pytest

from kangaroo import demo
from kangaroo.bench.recipe import BenchRecipe, read_bench_recipe
from kangaroo.drafters import DRAFTERS
from kangaroo.errors import ConfigError
from kangaroo.toml import parse_table

ROOT = Path(__file__).parents[2]
METHOD = {"name": "a", "drafter": "early-exit"}
EXPERIMENTS = ["threshold", "exit-layer", "domains"]


def parse(**keys: Any) -> BenchRecipe:
    return parse_table(BenchRecipe, {"model": "demo", "output": "runs/x", **keys}, "x.toml")


def test_the_shipped_recipe_is_valid() -> None:
    recipe = read_bench_recipe(ROOT / "recipes" / "spec-bench.toml", {"questions": "mine.jsonl"})
    assert (recipe.max_tokens, recipe.dtype, recipe.threads, recipe.questions) == (128, "auto", 2, "mine.jsonl")
    assert {"kangaroo", "kangaroo-tree", "early-exit", "transformers"} <= {method.name for method in recipe.methods}


def test_the_demos_adapters_by_their_names() -> None:
    assert demo.find_adapter("demo") == demo.ADAPTER
    assert demo.find_adapter("demo-paper") == demo.ADAPTER.with_name("adapter-paper")
    assert demo.find_adapter("runs/mine/best") == Path("runs/mine/best")


@pytest.mark.parametrize(
    "name", ["spec-bench-kangaroo", "spec-bench-sampled", *(f"experiments/{n}" for n in EXPERIMENTS)]
)
def test_so_are_the_others_of_the_demo(name: str) -> None:
    for quick in {False, name.startswith("experiments")}:
        recipe = read_bench_recipe(ROOT / "recipes" / f"{name}.toml", quick=quick)
        assert recipe.model == "demo"
        assert recipe.threads == 2


def test_optional_methods_are_left_out_without_their_files(tmp_path: Path) -> None:
    (tmp_path / "there.rest").touch()
    rest = {"name": "rest", "drafter": "rest", "optional": True, "datastore": str(tmp_path / "there.rest")}
    heads = {"name": "heads", "drafter": "medusa", "optional": True, "heads": str(tmp_path / "gone")}
    peer = {"name": "peer", "kind": "transformers", "optional": True, "draft_model": str(tmp_path / "gone")}
    shipped = {"name": "shipped", "drafter": "kangaroo", "optional": True, "adapter": "demo"}
    recipe, lacking = parse(methods=[METHOD, rest, heads, peer, shipped]).without_missing()
    assert [method.name for method in recipe.methods] == ["a", "rest", "shipped"]
    assert lacking == {"heads": f"no heads in {tmp_path / 'gone'}", "peer": f"no draft_model in {tmp_path / 'gone'}"}
    # Those that are not optional stay, to fail by name.
    assert parse(methods=[{**heads, "optional": False}]).without_missing()[1] == {}


@pytest.mark.parametrize("drafter", [name for name in DRAFTERS if name != "none"])
def test_any_drafter_may_be_measured_and_keeps_its_settings(drafter: str) -> None:
    method = parse(methods=[{"name": "a", "drafter": drafter, "max_draft": 3}]).methods[0]
    assert (method.kind, method.drafter, method.settings) == ("drafter", drafter, {"max_draft": 3})


def test_every_repeat_is_another_sample_of_the_same_seed() -> None:
    recipe = parse(seed=5, sampling={"temperature": 0.8, "top_p": 0.9})
    assert [(s.seed, s.index, s.temperature, s.top_p) for s in map(recipe.sampled, (0, 2))] == [
        (5, 0, 0.8, 0.9),
        (5, 2, 0.8, 0.9),
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"sampling": {"temprature": 1}}, "unknown key 'sampling.temprature'; did you mean 'temperature'"),
        ({"batch": 0}, "batch: .*greater than 0, got 0"),
        ({"end": "never"}, "end: .*'natural' or 'barred', got 'never'"),
        ({"methods": [{"drafter": "llma"}]}, "'methods.0.name' is missing"),
        ({"methods": [METHOD, METHOD]}, "two methods are called 'a'"),
        ({"methods": [{**METHOD, "name": "none"}]}, "'none' is the baseline"),
        ({"methods": [{**METHOD, "name": "../x"}]}, "a method's name is letters"),
        ({"methods": [{"name": "a"}]}, "needs a drafter"),
        ({"methods": [{**METHOD, "kind": "transformers"}]}, 'kind "transformers" has none'),
        ({"methods": [{"name": "a", "drafter": "eagle"}]}, "drafter must be one of .*got 'eagle'"),
        ({"methods": [{**METHOD, "optional": True}]}, "a: optional is for a method that names the file or folder"),
        ({"sampling": {"temperature": 1e-9}}, "sampling: temperature must be"),
        ({"sampling": {"top_p": 2}}, r"sampling: top_p must be in \(0, 1\], got 2"),
        (
            {"sampling": {"temperature": 0.8}, "methods": [{"name": "t", "kind": "transformers"}]},
            "t: transformers draws with noise of its own",
        ),
    ],
)
def test_mistakes_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**keys)
