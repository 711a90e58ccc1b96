"""Where results go: places that cannot be written to, two writers at once, and what is promised of what is printed."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damage import Refused
from pydantic import TypeAdapter
from rich.console import Console

from chat_model import SENTENCES
from command import invoke
from kangaroo.bench.check import CheckReport, Divergence, Rounds
from kangaroo.bench.compare import Line
from kangaroo.cli import demo
from kangaroo.cli.schema import VERBS
from kangaroo.cli.tables import print_facts, print_rows
from kangaroo.cli.terminal import show_checks, show_lines
from kangaroo.decoder import load
from kangaroo.errors import CapacityError, ConfigError
from kangaroo.files import claim, write_json, write_text
from kangaroo.trial import Exactness


@pytest.fixture
def documents(tmp_path: Path) -> str:
    (tmp_path / "books.txt").write_text("\n\n\n".join(SENTENCES))
    return str(tmp_path / "books.txt")


def places(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("kept")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "pipe")
    return {
        "a file": folder / "file",
        "below a file": folder / "file" / "below",
        "proc": Path("/proc/kangaroo"),
        "long": folder / ("x" * 5000),
        "loop": folder / "loop",
        "null character": folder / "nu\0ll",
        "pipe": folder / "pipe",
        "link to a pipe": folder / "link",
    }


@pytest.mark.parametrize("place", ["below a file", "proc", "long", "loop", "null character", "pipe", "link to a pipe"])
def test_a_datastore_that_cannot_be_written(
    place: str, documents: str, model: str, refused: Refused, tmp_path: Path
) -> None:
    output = places(tmp_path)[place]
    output = output / "x.rest" if place == "loop" else output
    refused("datastore", "build", documents, "--model", model, "--output", str(output))
    assert (tmp_path / "file").read_text() == "kept"
    assert (tmp_path / "pipe").is_fifo(), "what is no file, as a device is none, stays where it is"


@pytest.mark.parametrize("place", ["a file", "below a file", "proc", "long", "loop", "null character", "pipe"])
def test_an_output_folder_that_cannot_be_made(
    place: str, documents: str, model: str, refused: Refused, tmp_path: Path
) -> None:
    output = places(tmp_path)[place]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'kind = "adapter"\ntarget = "{model}"\noutput = "x"\n[adapter]\nexit_layer = 1\n[schedule]\nsteps = 1\n'
        "[data]\nheld_out = 2\n[evaluation]\nprompts = 2\nmax_tokens = 4\n"
    )
    refused("train", str(recipe), "--data", documents, "--output", str(output))
    bench = tmp_path / "bench.toml"
    bench.write_text(f'model = "{model}"\noutput = "x"\nlimit = 1\nmax_tokens = 2\n')
    refused("bench", str(bench), "--output", str(output))
    assert (tmp_path / "file").read_text() == "kept"


HOLD = """
import sys
from pathlib import Path
from kangaroo.files import claim
with claim(Path(sys.argv[1])):
    print(flush=True)
    input()
"""
INTERRUPTED = """
import os, signal, sys
class Stop:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it puts in the background
sys.meta_path.insert(0, Stop())
from kangaroo_command import main
main()
"""


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        with pytest.raises(ConfigError, match="another process is writing"), claim(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with claim(tmp_path):  # nothing is left of a process that was killed
        pass


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_two_trainings_never_share_an_output(
    resume: list[str], documents: str, model: str, refused: Refused, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(
        f'kind = "adapter"\ntarget = "{model}"\noutput = "{output}"\n[adapter]\nexit_layer = 1\n[schedule]\nsteps = 1\n'
        "batch_sequences = 1\n[data]\nheld_out = 2\n[evaluation]\nprompts = 2\nmax_tokens = 4\n"
    )
    with claim(output):
        assert "another process is writing" in refused("train", str(recipe), "--data", documents, *resume)
    if not resume:
        assert invoke("train", str(recipe), "--data", documents) == 0


def test_a_full_disk_is_told_from_a_place_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x", "old")

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", lambda path, text, encoding: full(path))
    with pytest.raises(CapacityError, match="No space left on device; make room"):
        write_json(tmp_path / "x", {})
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


COMMAND = [sys.executable, "-c", "from kangaroo_command import main; main()"]
NO_ROOM = ["error: cannot write to standard output: No space left on device"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_an_answer_to_a_full_disk(more: list[str], model: str) -> None:
    arguments = ("generate", "--model", model, "--drafter", "none", "--prompt", "x", "--max-tokens", "2", *more)
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines() == NO_ROOM


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_help_to_a_full_disk() -> None:
    command = [*COMMAND, "--help"]
    with Path("/dev/full").open("w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert (done.returncode, done.stderr.splitlines()) == (2, NO_ROOM)


def test_an_interruption_while_the_program_loads() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, "generate"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc']", "name one in TMPDIR"),
        ("import sys; sys.modules['uvicorn'] = None", "kangaroo-decoding[serve]"),
    ],
    ids=["no temporary folder", "no server"],
)
def test_what_is_missing_while_the_program_loads(broken: str, named: str) -> None:
    command = f"{broken}; from kangaroo_command import main; main()"
    done = subprocess.run([sys.executable, "-c", command, "serve"], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


# --- JSON


def conforms(verb: str, text: str) -> None:
    """Exactly the fields that the schema names, of their types."""
    TypeAdapter(VERBS[verb]).validate_json(text)


def test_what_is_printed_for_machines_is_what_the_schema_says(
    model: str, documents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = ("--model", model, "--drafter", "early-exit", "--set", "exit_layer=1", "--json")
    (tmp_path / "prompts.txt").write_text("Where?\nWhy?\n")
    for given in (["--prompt", "Where?"], ["--prompts", str(tmp_path / "prompts.txt")]):
        assert invoke("generate", *early, *given, "--max-tokens", "5") == 0
        text = capsys.readouterr().out
        conforms("generate", text)
        for answer in json.loads(text)["answers"]:
            assert len(answer["drafted"]) == len(answer["tokens"])
    assert invoke("check", *early, "--prompts", "2", "--max-tokens", "3") == 1
    conforms("check", capsys.readouterr().out)
    assert invoke("info", *early) == 0
    conforms("info", capsys.readouterr().out)
    assert invoke("compare", "Where?", "--model", model, "--max-tokens", "4", "--repeats", "1", "--json") == 0
    conforms("compare", capsys.readouterr().out)
    build = ("datastore", "build", documents, "--model", model, "--output", str(tmp_path / "x.rest"), "--json")
    assert invoke(*build) == 0
    conforms("datastore build", capsys.readouterr().out)
    adapter = Path(model).with_name("adapter")
    assert (
        invoke("export", str(adapter), "--for", "mlx", "--model", model, "--output", str(tmp_path / "x"), "--json") == 0
    )
    conforms("export", capsys.readouterr().out)


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_the_demo_prints_what_the_schema_says(
    temperature: str, chat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    little = load(str(chat / "target"), adapter=chat / "adapter", dtype="float64")
    monkeypatch.setattr(demo, "ModelOptions", lambda **_: SimpleNamespace(open=little.with_drafter))
    short = ("--prompts", "2", "--max-tokens", "6", "--temperature", temperature)
    assert invoke("demo", "--json", *short) == 0
    conforms("demo", capsys.readouterr().out)
    assert invoke("demo", *short) == 0
    assert "identical, every token" in capsys.readouterr().out


HEADINGS = ("drafter", "verdict", "answers", "rounds that accepted none", "had no draft")
ROWS = [("early-exit-tree", "inconclusive", "1234", "56", "78"), ("kangaroo+lookup", "lossless", "9", "8", "7")]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_tables_are_whole_at_every_width(width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, width=width, soft_wrap=True)
    print_rows(console, HEADINGS, ROWS, texts=["verdict"])
    print_facts(console, {"fingerprint": "1777bdd14e26-b308de1a434f-71962043aa25", "threads": "2"})
    lines = text.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in text.getvalue()
    words = " ".join(" ".join(lines).split())
    assert all(cell in words for row in ROWS for cell in row)
    assert (sum("answers" in line for line in lines) == 1) == (width == 200)
    assert "1777bdd14e26-b308de1a434f-71962043aa25" in words.replace(" ", "")


TIE = Divergence(0, 0.0, 1, 3, 5, 6, 1e-9, 1e-6, 5)
BITS, TIES = Exactness("bitwise", "by trial"), Exactness("ties", "by trial")
ENOUGH: dict[str, Any] = {"tokens": 10**6, "rounds": Rounds(all=1)}


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (CheckReport(BITS, **ENOUGH), "lossless"),
        (CheckReport(TIES, **ENOUGH, differences=[TIE]), "lossless"),
        (CheckReport(BITS), "inconclusive"),
        (CheckReport(TIES, differences=[TIE]), "inconclusive"),
        (CheckReport(BITS, **ENOUGH, differences=[TIE]), "FAILED"),
        (CheckReport(TIES, differences=[replace(TIE, gap=0.5)]), "FAILED"),
        (CheckReport(BITS, **ENOUGH, bits=1), "FAILED"),
    ],
)
def test_a_check_says_whether_it_failed_or_could_not_tell(
    report: CheckReport, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_checks({"kangaroo": report}, {}, report.exactness)
    said = capsys.readouterr().out
    assert [word for word in ("lossless", "inconclusive", "FAILED") if f" {word} " in said] == [verdict]


def test_a_comparison_tells_ties_from_losses(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"seconds": 1.0, "speedup": 1.0, "rounds": 1, "drafted": 0, "accepted": 0}
    shares = dict.fromkeys(("prefill", "draft", "verify", "rest"), 0.25)
    lines = [
        Line(method=name, tokens=[1], identical=name == "none", **figures, **shares) for name in ("none", "a", "b")
    ]
    show_lines(lines, {}, {"a"}, TIES)
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert ["identical" in told["none"], "a tie" in told["a"], "DIFFERS" in told["b"]] == [True] * 3


def test_the_document_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    for verb, kind in VERBS.items():
        assert f"| `{verb}` |" in text
        schema = TypeAdapter(kind).json_schema()
        for part in (schema, *schema.get("$defs", {}).values()):
            assert all(f"`{name}`" in text for name in part.get("properties", {}))
