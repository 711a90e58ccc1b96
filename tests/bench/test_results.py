"""The measurements kept with the project can be read, and say what their reports say."""

from pathlib import Path

import pytest

from kangaroo.bench.report.folders import read_folders
from kangaroo.bench.report.page import to_document
from kangaroo.bench.report.results import find_mixture

RESULTS = Path(__file__).resolve().parents[2] / "results" / "little"


@pytest.mark.parametrize("run", ["demo-drafters", "experiments/exit-layer", "experiments/temperature"])
def test_the_report_follows_from_the_records(run: str) -> None:
    found = read_folders([RESULTS / run])
    written = (RESULTS / run / "report.md").read_text(encoding="utf-8")
    assert to_document(found.runs, find_mixture(found.runs), found.experiments) == written
