"""The report of an experiment: one table and one plot, from made-up records; and one experiment from recipe to page."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from little_experiments import EXPERIMENT, make_lab
from made_up import PROVENANCE, SPEC_BENCH, make_run, save_run

from command import invoke
from kangaroo.bench.published import EXPERIMENTS
from kangaroo.bench.recipe import read_bench_recipe
from kangaroo.bench.report.experiment import Experiment
from kangaroo.bench.report.experiment_plot import experiment_table
from kangaroo.bench.report.folders import read_folders
from kangaroo.errors import ConfigError, DataError

ABOUT = {"title": "What if?", "axis": "eta", "note": "It depends."}
Rows = list[dict[str, str]]


def save(folder: Path, methods: dict[str, dict[str, Any]], about: dict[str, Any], **facts: Any) -> Path:
    """A run of methods that accept more and more often, and what the recipe says of each."""
    said = [{"name": name, "drafter": "kangaroo", **keys} for name, keys in methods.items()]
    records = make_run({name: 0.4 + 0.1 * place for place, name in enumerate(methods)})
    recipe = PROVENANCE["recipe"] | {"methods": said, "experiment": ABOUT | about}
    return save_run(folder, records, recipe=recipe, **facts)


def read(folder: Path) -> Experiment:
    (experiment,) = read_folders([folder]).experiments
    return experiment


def rows_of(experiment: Experiment) -> Rows:
    table = experiment_table(experiment)
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def figure(folder: Path) -> str:
    assert invoke("report", str(folder)) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<figure role="img" aria-label="What if.*?</figure>', page, re.DOTALL)
    assert found
    assert page.count("<figure") == 1 or page.index("<figure") == page.index(found[0]), "it comes first"
    return found[0]


def test_figures_are_those_of_the_runs_report(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", {"a": {"at": 0.3, "series": "gamma = 4"}, "b": {"at": "auto"}}, {})
    assert invoke("report", str(folder)) == 0
    with (folder / "report.csv").open(encoding="utf-8") as file:
        figures = {(r["method"], r["figure"]): r for r in csv.DictReader(file) if r["task"] == "overall"}
    rows = rows_of(read(folder))
    assert [(row["eta"], row["series"]) for row in rows] == [("0.3", "gamma = 4"), ("auto", "kangaroo")]
    for name, row in zip(("a", "b"), rows, strict=True):
        found = figures[name, "speedup"]
        assert row["speed-up"] == "{:.2f} ({:.2f}–{:.2f})".format(*(float(found[k]) for k in ("value", "low", "high")))
        rate, low, high = map(float, re.findall(r"[\d.]+", row["CR"]))
        assert rate == pytest.approx(float(figures[name, "compression_rate"]["value"]), abs=0.006)
        assert low < rate < high
        assert row["CTAR(2)"] == f"{100 * float(figures[name, 'ctar_2']['value']):.1f} %"
        assert row["drafted per round"] == f"{float(figures[name, 'drafted_per_round']['value']):.2f}"
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.index("What if?") < text.index("It depends.") < text.index("### The experiment") < text.index("## run")


def test_the_papers_figures_stand_beside_ours_and_are_labelled(tmp_path: Path) -> None:
    methods = {"a": {"at": 0.5, "series": "gamma = 4"}, "b": {"at": 0.5, "series": "gamma = 8"}, "c": {"at": 0.2}}
    folder = save(tmp_path / "run", methods, {"published": "threshold"})
    experiment = read(folder)
    rows = rows_of(experiment)
    assert [row["paper: speed-up"] for row in rows[:3]] == ["~1.47", "1.48", "–"]
    assert [row["paper: CR"] for row in rows[:3]] == ["2.05", "2.13", "–"]
    assert len(rows) == 3 + len(EXPERIMENTS["threshold"]) - 2, "each figure of the paper is there once"
    assert all(row["speed-up"] == "–" for row in rows[3:])
    assert (
        "The paper's figures, of another model on another machine: Liu et al. 2024" in experiment_table(experiment).note
    )
    drawn = figure(folder)
    assert "gamma = 8 (paper)" in drawn
    assert "stroke-dasharray" in drawn, "read without colour"


def test_the_papers_places_are_brought_to_ours(tmp_path: Path) -> None:
    about = {"published": "exit-layer", "published_scale": 24}
    rows = rows_of(read(save(tmp_path / "run", {"a": {"at": 3}, "b": {"at": 4}}, about)))
    assert [(row["eta"], row["paper: speed-up"]) for row in rows[:2]] == [("3", "1.44"), ("4", "–")]
    assert [row["eta"] for row in rows[2:]] == ["0", "1.5", "6", "12"]


def test_what_the_published_tables_say() -> None:
    assert {p.at: (p.compression_rate, p.speedup) for p in EXPERIMENTS["exit-layer"]}[0.125] == (2.33, 1.44)
    grid = {(p.series, p.at): (p.compression_rate, p.speedup) for p in EXPERIMENTS["threshold"]}
    assert (grid["gamma = 6", 0], grid["gamma = 6", 0.6]) == ((2.29, 1.20), (2.06, 1.50))
    assert len(grid) == len(EXPERIMENTS["threshold"]) == 16
    sizes = {p.at: (p.millions, p.speedup) for p in EXPERIMENTS["adapter"]}
    assert sizes["medusa"] == (591, 1.41)


def test_gain_per_million_where_sizes_differ(tmp_path: Path) -> None:
    sizes = {"kangaroo": 500_000, "medusa": 2_000_000}
    folder = save(
        tmp_path / "run", {"kangaroo": {}, "medusa": {}, "early": {}}, {"published": "adapter"}, parameters=sizes
    )
    rows = rows_of(read(folder))
    for row, size in zip(rows, (0.5, 2.0, None), strict=False):
        speedup = float(row["speed-up"].split()[0])
        if size is None:
            assert (row["trained parameters"], row["gain per million"]) == ("–", "–")
        else:
            assert row["trained parameters"] == f"{size:.2f} M"
            assert float(row["gain per million"]) == pytest.approx((speedup - 1) / size, abs=0.006 / size)
    assert (rows[0]["paper: parameters"], rows[1]["paper: speed-up"]) == ("67 M", "1.41")
    same = save(tmp_path / "same", {"a": {}, "b": {}}, {}, parameters={"a": 5, "b": 5})
    assert "gain per million" not in rows_of(read(same))[0]
    assert "paper" in figure(folder)


def test_a_point_per_task(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", {"a": {}, "b": {}}, {"by": "task", "axis": "task"})
    experiment = read(folder)
    assert [(p.at, p.series) for p in experiment.points[:2]] == [("Translation", "a"), ("QA", "a")]
    assert len(experiment.points) == 2 * len(SPEC_BENCH)
    (run,) = read_folders([folder]).runs
    assert experiment.points[1].summary == run.summaries["a"]["qa"]
    assert "RAG" in figure(folder)


def test_a_sweep_is_reported_as_one(tmp_path: Path) -> None:
    for value in (1, 2, 16):
        save(tmp_path / "sweep" / str(value), {"a": {}, "b": {"series": "other"}}, {"axis": "batch"})
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"key": "batch", "values": [1, 2, 16]}))
    found = read_folders([tmp_path / "sweep"])
    assert [run.name for run in found.runs] == ["batch = 1", "batch = 2", "batch = 16"]
    assert [(p.at, p.series) for p in found.experiments[0].points[:3]] == [(1, "a"), (1, "other"), (2, "a")]
    assert "batch" in figure(tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"key": "batch", "values": [1, 4]}))
    with pytest.raises(DataError, match=r"no records in .*4"):
        read_folders([tmp_path / "sweep"])
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(DataError, match=r"sweep.json is damaged"):
        read_folders([tmp_path / "sweep"])


def test_rounds_are_projected_where_a_recipe_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", {"a": {}}, {"projected": "a"})
    assert invoke("report", str(folder)) == 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.index("### The experiment") < text.index("Projected speed-ups (not measured)") < text.index("## run")


def test_runs_without_an_experiment_are_reported_as_before(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", make_run({"a": 0.5}))
    assert read_folders([folder]).experiments == []


def test_texts_drawn_by_rejection_are_not_called_differences(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", {"a": {}, "b": {"rule": "reject"}}, {})
    lines = (folder / "records.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if row["method"] == "b":
            row["turns"][0]["tokens"][0] += 1
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert invoke("report", str(folder)) == 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Every answer is plain decoding's, token by token. b: by rejection, texts of their own." in text
    assert "Answers that differ" not in text


def test_unknown_tables_and_projections_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for line, message in (
        ('published = "layers"', "published must be one of exit-layer, threshold, adapter, got 'layers'"),
        ('projected = "x"', r"experiment.projected names one of the methods"),
    ):
        path.write_text(f'model = "demo"\noutput = "x"\n{EXPERIMENT}{line}\n', encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_bench_recipe(path)


def test_from_a_recipe_to_the_page(
    tmp_path: Path, model: Path, questions: Path, untimed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab(tmp_path, model / "target", questions)
    method = '[training]\nrecipe = "adapter.toml"\n[[methods]]\nname = "k"\ndrafter = "kangaroo"\ntrain = {}\n'
    sweep = '[vary]\nkey = "sampling.temperature"\nvalues = [0, 0.7]\n[quick]\nlimit = 2\nmax_tokens = 4\n'
    lab.write(method, EXPERIMENT, sweep)
    command = ["bench", str(lab.recipe), "--quick", "--data", str(tmp_path / "meals.jsonl")]
    assert invoke(*command) == 0
    assert "8 answers, all of them those of plain decoding, token for token" in capsys.readouterr().out
    assert invoke("report", str(lab.output)) == 0
    text = (lab.output / "report.md").read_text(encoding="utf-8")
    assert "## Little things" in text
    rows = rows_of(read(lab.output))
    assert [(row["what differs"], row["series"]) for row in rows] == [("0", "k"), ("0.7", "k")]
    assert all(row["trained parameters"] != "–" for row in rows)
    capsys.readouterr()
    assert invoke(*(part for part in command if part != "--quick")) == 2
    assert "its recipe's max_tokens was 4" in capsys.readouterr().err, "the whole needs a folder of its own"
