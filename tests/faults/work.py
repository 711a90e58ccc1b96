"""What is interrupted: work that writes files, each with a way to go on and to say what it has come to."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "training"), str(HERE.parent / "bench")]

import lesson  # noqa: E402
from little_runs import EARLY, QUESTIONS, timeless  # noqa: E402
from safetensors import safe_open  # noqa: E402

from chat_model import SENTENCES, save_chat_model  # noqa: E402
from kangaroo.bench import run as bench_run  # noqa: E402
from kangaroo.bench.recipe import BenchRecipe  # noqa: E402
from kangaroo.bench.records import read_records  # noqa: E402
from kangaroo.bench.run import run_bench  # noqa: E402
from kangaroo.documents import Document  # noqa: E402
from kangaroo.drafters.copying.datastore import Datastore, build_datastore  # noqa: E402
from kangaroo.drafters.kangaroo.adapter import Adapter  # noqa: E402
from kangaroo.errors import KangarooError  # noqa: E402
from kangaroo.loading import load_model, load_tokenizer  # noqa: E402
from kangaroo.model import Target  # noqa: E402
from kangaroo.toml import parse_table  # noqa: E402
from kangaroo.training.checkpoint import STATE  # noqa: E402
from kangaroo.training.run import train  # noqa: E402

REFUSED, BROKEN = 2, 3
"""What a child exits with after an error of ours, and after any other."""


@dataclass(frozen=True)
class Work:
    """Something that ends with files in a folder."""

    act: Callable[[Path], object]
    """Do it, or go on with it, in a folder."""
    whole: Callable[[Path], object]
    """Raises unless whatever the folder holds at this moment is whole."""
    result: Callable[[Path], Any]
    """What it has come to, to be compared."""


def make_works(base: Path) -> dict[str, Work]:
    """All of them, with the models they need below a folder."""
    chat = save_chat_model(base / "chat")
    return {
        "train": _training(base),
        "bench": _benchmark(base, chat),
        "datastore build": _building(chat),
        "adapter save": _saving(chat),
    }


def _training(base: Path) -> Work:
    lesson.make_target(base / "target")
    data = lesson.write_rows(base / "meals.jsonl", lesson.conversations())
    recipe = base / "recipe.toml"
    recipe.write_text(lesson.ADAPTER.format(target=base / "target", output="run"))

    def act(folder: Path) -> None:
        run = folder / "run"
        places = {"output": str(run), "states": str(run / "states")}
        train(recipe, [data], overrides=places, resume=(run / STATE).is_file())

    def result(folder: Path) -> Any:
        return (folder / "run" / "best" / "adapter.safetensors").read_bytes()

    return Work(act, lambda folder: None, result)


def _benchmark(base: Path, chat: Path) -> Work:
    questions = base / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    bench_run.method_costs = lambda decoder: None  # type: ignore[attr-defined,assignment]

    def act(folder: Path) -> None:
        table = {"model": str(chat / "target"), "questions": str(questions), "output": str(folder / "run")}
        more = {"max_tokens": 10, "dtype": "float64", "threads": 1, "repeats": 3, "methods": [EARLY]}
        run_bench(parse_table(BenchRecipe, table | more, "faults"))

    def result(folder: Path) -> Any:
        return sorted(map(json.dumps, timeless(read_records(folder / "run"))))

    return Work(act, lambda folder: None, result)


def _building(chat: Path) -> Work:
    tokenizer = load_tokenizer(chat / "target")
    documents = [Document("d", text=f"{text} {number}") for number in range(400) for text in SENTENCES[:3]]

    def whole(folder: Path) -> None:
        if (folder / "x.rest").exists():
            assert Datastore.open(folder / "x.rest", tokenizer, 300).documents == len(documents)

    return Work(
        lambda folder: build_datastore(documents, tokenizer, folder / "x.rest"),
        whole,
        _content,
    )


def _content(folder: Path) -> dict[str, Any]:
    """Of a datastore: safetensors writes the facts in any order."""
    with safe_open(folder / "x.rest", framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in ("tokens", "order")} | file.metadata()


def _saving(chat: Path) -> Work:
    target = Target(load_model(chat / "target"))
    adapter = Adapter.load(chat / "adapter", target)

    def act(folder: Path) -> None:
        for turn in range(40):
            adapter.layers[0].norm_in.weight.data.fill_(turn + 1)
            adapter.save(folder, {"turn": turn})

    def whole(folder: Path) -> None:
        if (folder / "config.json").exists():
            found = Adapter.load(folder, target)
            turn = json.loads((folder / "config.json").read_text())["provenance"]["turn"]
            assert (found.layers[0].norm_in.weight == turn + 1).all()

    return Work(act, whole, lambda folder: (folder / "adapter.safetensors").read_bytes())


def fork(act: Callable[[], object]) -> int:
    """Do something in a child, which can be killed; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = BROKEN
    try:
        act()
        code = 0
    except KangarooError as error:
        code = BROKEN if "\n" in str(error) else REFUSED
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit status of a child; -9 for one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
