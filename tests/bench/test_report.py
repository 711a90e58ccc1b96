"""`kangaroo report`, run as a user runs it, on made-up records; the page is looked at as text and in a browser."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import PROVENANCE, make_run, record, save_run, turn

from command import invoke
from kangaroo.bench.records import BASELINE, Difference
from kangaroo.bench.report.results import find_mixture, read_runs
from kangaroo.bench.report.tables import make_tables
from kangaroo.bench.report.words import facts, lead
from kangaroo.errors import DataError
from little_model import TARGET

METHODS = {"kangaroo": 0.75, "early-exit": 0.4}
COSTS = {"kangaroo": {"draft_share": 0.12}}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "one", make_run(METHODS), costs=COSTS)


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    assert invoke("report", str(folder)) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def table_of(folder: Path, key: str) -> list[tuple[str, ...]]:
    tables = {table.key: table for table in make_tables(read_runs([folder])[0])}
    return [tables[key].header, *tables[key].rows]


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert "http" not in page
    assert not re.search(r"<(script|link|img|object|iframe|embed|base)\b|@import|xmlns|\bsrc=", page)
    assert all(target.startswith("#") for target in re.findall(r"(?:href=\"|url\()([^\")]*)", page))


def test_every_plot_is_inline_and_its_ids_are_its_own(page: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) == 7 + 1 + 2 + 1 + 1  # speed-ups, acceptance, drafts, time, bound
    for figure in figures:
        assert re.match(r'<figure role="img" aria-label="[^"]+" style="[^"]+"><svg viewBox', figure)
        assert "<text" in figure, "text is text"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", page)) <= set(ids)


def test_methods_are_told_apart_without_colour(page: str) -> None:
    lines = re.search(r'aria-label="CTAR.*?</figure>', page, re.DOTALL)
    assert lines
    assert "stroke-dasharray" in lines[0], "line styles"
    time = re.search(r'aria-label="plain decoding.*?</figure>', page, re.DOTALL)
    assert time
    assert len(re.findall("<pattern", time[0])) == 3, "every phase but one is hatched"


def test_methods_are_set_beside_another_one_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", make_run({"ours": 0.6, "theirs": 0.3}))
    assert invoke("report", str(run), "--against", "ours") == 0
    text = (run / "report.md").read_text(encoding="utf-8")
    table = text[text.index("### Beside ours") :].split("###")[1]
    assert "| theirs |" in table
    assert "| plain decoding |" in table
    assert invoke("report", str(run), "--against", "nobody") == 2
    assert "no method 'nobody'" in capsys.readouterr().err


def test_the_same_records_make_the_same_page(folder: Path, page: str) -> None:
    assert invoke("report", str(folder)) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_figures_agree_between_markdown_csv_and_page(folder: Path, page: str) -> None:
    with (folder / "report.csv").open(encoding="utf-8") as file:
        rows = {(row["method"], row["task"], row["figure"]): row for row in csv.DictReader(file)}
    found = rows["kangaroo", "qa", "speedup"]
    shown = f"{float(found['value']):.2f} ({float(found['low']):.2f}–{float(found['high']):.2f})"
    assert shown in (folder / "report.md").read_text(encoding="utf-8")
    assert shown.replace(" (", " <small>(") in page
    ctar = [
        float(row["value"])
        for (method, task, name), row in rows.items()
        if name.startswith("ctar_") and (method, task) == ("kangaroo", "overall")
    ]
    assert float(rows["kangaroo", "overall", "compression_rate"]["value"]) == pytest.approx(1 + sum(ctar))


def test_tables_of_two_answers_worked_out_by_hand(tmp_path: Path) -> None:
    text = list(range(8))
    tied = Difference(position=7, gap=0.01, tie=True)
    ours = turn([*text[:7], 9], [3, 3, 2], [4, 2, 1], (1.0, 0.2, 0.4, 0.4), difference=tied, peak_bytes=2_000_000)
    records = [record(1, BASELINE, turn(text, seconds=(1.0, 0.0, 2.0, 1.0))), record(1, "ours", ours)]
    folder = save_run(tmp_path / "hand", records, costs={"ours": {"draft_share": 0.1}})
    assert table_of(folder, "overview")[1:] == [
        ("plain decoding", "–", "2.0", "1.00", "0.00", "–", "1 of 1", "–"),
        ("ours", "2.00", "4.0", "2.67", "2.33", "71.4 %", "0 of 1", "2 MB"),
    ]
    assert table_of(folder, "speedup") == [("method", "QA"), ("ours", "2.00")]
    assert table_of(folder, "acceptance")[1] == ("ours", "100.0 %", "66.7 %")
    assert table_of(folder, "drafts") == [
        ("method", "rounds", "drafted per round", "confidence", "length"),
        ("ours", "3", "2.33", "66.7 %", "33.3 %"),
    ]
    assert table_of(folder, "time")[2] == ("ours", "125.00", "25.00", "50.00", "50.00", "250.00")
    # Decoding: 3 s against 1 s; the bound: 8 tokens for 3 rounds and 7 drafts at 0.1.
    assert table_of(folder, "bound") == [
        ("method", "measured", "bound: weights", "reached"),
        ("ours", "3.00", "2.16", "138.8 %"),
    ]
    assert table_of(folder, "differences")[1] == ("ours", "QA", "1", "0", "0", "7", "0.01", "yes")


def test_bounds_are_of_one_question_at_a_time(folder: Path, tmp_path: Path) -> None:
    assert table_of(folder, "bound")[1][0] == "kangaroo"
    batched = save_run(tmp_path / "batched", make_run(METHODS), costs=COSTS, recipe={"model": "demo", "batch": 4})
    assert "bound" not in {table.key for table in make_tables(read_runs([batched])[0])}


def test_prompts_that_were_cut_are_told_of(tmp_path: Path) -> None:
    records = [record(1, m, turn([1, 2]).model_copy(update={"dropped_tokens": 1234})) for m in (BASELINE, "ours")]
    assert "lost 1,234 tokens" in lead(read_runs([save_run(tmp_path / "cut", records)])[0])


def test_the_papers_table_stands_beside_all_of_spec_bench_only(folder: Path, tmp_path: Path) -> None:
    rows = table_of(folder, "paper")
    assert rows[4][:3] == ("Kangaroo, 7B (paper)", "1.41 / 1.24", "1.87 / 1.43")
    assert [row[0] for row in rows[-2:]] == ["kangaroo (this run)", "early-exit (this run)"]
    part = save_run(tmp_path / "part", make_run(METHODS, tasks=("qa", "rag")))
    assert "paper" not in {table.key for table in make_tables(read_runs([part])[0])}


def test_a_provenance_is_told_without_what_lies_on_the_machine() -> None:
    told = dict(
        facts(
            {
                "recipe": {"output": "/here", "questions": "/there/q.jsonl", "split": None},
                "dirty": False,
                "machine": {"memory_bytes": 2 * 10**9, "gpus": []},
                "costs": {},
            }
        )
    )
    assert told == {"recipe: questions": "q.jsonl", "dirty": "no", "machine: memory": "2 GB", "machine: gpus": "–"}


def test_a_run_of_the_baseline_alone_has_a_page(tmp_path: Path) -> None:
    alone = save_run(tmp_path / "alone", make_run({}, tasks=("poems",), questions=1))
    assert invoke("report", str(alone)) == 0
    assert "plain decoding" in (alone / "report.html").read_text(encoding="utf-8")


def test_several_runs_make_one_report_with_a_section_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Folders of the same name in different places.
    folder, other = (
        save_run(tmp_path / place / "one", make_run({"kangaroo": 0.6}, tasks=("qa",), seed=seed))
        for seed, place in enumerate(("here", "there"))
    )
    assert invoke("report", str(folder), str(other)) == 2
    assert "--output" in capsys.readouterr().err
    together = tmp_path / "together"
    assert invoke("report", str(folder), str(other), "--output", str(together)) == 0
    text = (together / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert f">{other}</h2>" in text
    assert invoke("report", str(folder), str(folder), "--output", str(together)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "fedcba"}, 'one and other differ: commit "0123456789abcdef" and "fedcba"'),
        ({"dirty": True}, "differ: dirty false and true"),
        ({"machine": {"cpu": "Another", "cores": 2}}, 'differ: machine cpu "A made-up processor" and "Another"'),
        ({"versions": {"python": "3.11.7", "torch": "2.14.0"}}, 'differ: versions torch "2.13.0" and "2.14.0"'),
        ({"resumed": [{"at": "later", "commit": "fedcba", "dirty": False}]}, "other was resumed: commit"),
        ({"resumed": [{"at": "later", "commit": "0123456789abcdef", "dirty": False}]}, None),
        ({"threads": 2}, None),
    ],
)
def test_runs_of_different_machines_commits_or_versions_are_found(
    folder: Path, tmp_path: Path, change: dict, message: str | None
) -> None:
    other = save_run(tmp_path / "other", make_run({}, tasks=("qa",)), **change)
    found = find_mixture(read_runs([folder, other]))
    assert found is None if message is None else found is not None and message in found


def test_a_mixture_is_refused_unless_asked_for_and_then_said_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_run(tmp_path / "one", make_run({}, tasks=("qa",)))
    other = save_run(tmp_path / "other", make_run({}, tasks=("qa",)), commit="fedcba")
    output = tmp_path / "report"
    assert invoke("report", str(folder), str(other), "--output", str(output)) == 2
    assert "--mixed" in capsys.readouterr().err
    assert not output.exists()
    assert invoke("report", str(folder), str(other), "--output", str(output), "--mixed") == 0
    assert 'class="warning">Not everything here can be compared' in (output / "report.html").read_text(encoding="utf-8")


def test_a_run_without_provenance_or_with_half_of_it_is_refused(tmp_path: Path) -> None:
    broken = save_run(tmp_path / "broken", make_run({}))
    path = broken / "provenance.json"
    for text, message in [
        (json.dumps({key: value for key, value in PROVENANCE.items() if key != "machine"}), "the run's machine"),
        (json.dumps(PROVENANCE | {"costs": {"kangaroo": {"draft_share": "dear"}}}), "costs: "),
        ("{", "provenance.json is damaged"),
        ("[]", "one object"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_runs([broken])
    path.unlink()
    with pytest.raises(DataError, match="does not say where its records come from"):
        read_runs([broken])


def test_without_matplotlib_the_extra_is_named_and_the_old_report_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", make_run(METHODS))
    (run / "report.md").write_text("old")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert invoke("report", str(run)) == 2
    assert "kangaroo-decoding[bench]" in capsys.readouterr().err
    assert (run / "report.md").read_text() == "old"
    assert not (run / "report.html").exists()


def test_both_counts_are_shown_when_asked_for(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [record(1, m, turn([1, 2, 3], [1, 2])) for m in (BASELINE, "ours")])
    (run / "answers").mkdir()
    for method, seconds in ((BASELINE, 2.0), ("ours", 1.0)):
        choice = {
            "index": 0,
            "turns": ["Hello, world."],
            "new_tokens": [3],
            "wall_time": [seconds],
            "accept_lengths": [1, 2],
        }
        row = {"question_id": 1, "category": "qa", "choices": [choice]}
        (run / "answers" / f"{method}.jsonl").write_text(json.dumps(row) + "\n")
    tokens = len(read_tokens("Hello, world."))
    assert tokens > 1
    assert invoke("report", str(run), "--legacy") == 0
    text = (run / "report.md").read_text(encoding="utf-8")
    assert f"| ours, legacy | {3 / ((tokens - 1) / 2):.2f} |" in text
    assert "| ours, corrected | 2.00 |" in text
    row = (run / "answers" / "ours.jsonl").read_text()
    (run / "answers" / "ours.jsonl").write_text(row.replace('"question_id": 1', '"question_id": 2'))
    with pytest.raises(DataError, match=r"ours.jsonl does not answer the questions of the records"):
        read_runs([run], count=True)


def read_tokens(text: str) -> list[int]:
    from kangaroo.loading import load_tokenizer

    return list(load_tokenizer(TARGET)(text).input_ids)


PROBE = """<script>
const within = (a, b) => a.left > b.left - 3 && a.right < b.right + 3 && a.top > b.top - 3 && a.bottom < b.bottom + 3;
const cut = [...document.querySelectorAll("svg")].flatMap(svg => [...svg.querySelectorAll("text")]
  .filter(t => !within(t.getBoundingClientRect(), svg.getBoundingClientRect())).map(t => t.textContent));
for (const cell of document.querySelectorAll("th, td"))
  if (cell.scrollWidth > cell.clientWidth + 1) cut.push(cell.textContent);
const wide = document.documentElement.scrollWidth > innerWidth;
const flat = [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height < 40).length;
document.documentElement.innerHTML = JSON.stringify({cut, wide, flat, innerWidth});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [500, 1280])  # as narrow as a headless window gets
def test_in_a_browser_nothing_is_cut_off_and_the_page_does_not_scroll_sideways(
    page: str, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page + PROBE, encoding="utf-8")
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--window-size={width},900"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run([BROWSER, *options, profile, path.as_uri()], capture_output=True, text=True, timeout=60)
    found = json.loads(re.search(r"{.*}", done.stdout)[0])
    assert found == {"cut": [], "wide": False, "flat": 0, "innerWidth": width}
