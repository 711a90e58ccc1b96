"""What is interrupted: work that writes files, each with a way to go on and to say what it has come to."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_gguf_pytorch_utils

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "training"), str(HERE.parent / "bench")]

import lesson  # noqa: E402
from little_runs import EARLY, QUESTIONS, timeless  # noqa: E402

from chat_model import SENTENCES, save_chat_model  # noqa: E402
from kangaroo.bench import run as bench_run  # noqa: E402
from kangaroo.bench.provenance import PROVENANCE  # noqa: E402
from kangaroo.bench.recipe import BenchRecipe  # noqa: E402
from kangaroo.bench.records import RECORDS, read_records  # noqa: E402
from kangaroo.bench.report.results import read_runs  # noqa: E402
from kangaroo.bench.run import run_bench  # noqa: E402
from kangaroo.decoder import load  # noqa: E402
from kangaroo.demo import smollm2  # noqa: E402
from kangaroo.documents import Document  # noqa: E402
from kangaroo.drafters.copying.datastore import Datastore, build_datastore  # noqa: E402
from kangaroo.drafters.kangaroo.adapter import Adapter  # noqa: E402
from kangaroo.drafters.kangaroo.calibration import Calibration  # noqa: E402
from kangaroo.errors import KangarooError, ModelError  # noqa: E402
from kangaroo.loading import load_model, load_tokenizer  # noqa: E402
from kangaroo.model import Target  # noqa: E402
from kangaroo.sealed import read_sealed  # noqa: E402
from kangaroo.toml import parse_table  # noqa: E402
from kangaroo.training.checkpoint import STATE  # noqa: E402
from kangaroo.training.metrics import METRICS, read_metrics  # noqa: E402
from kangaroo.training.run import train  # noqa: E402
from kangaroo.training.target_text import WRITTEN  # noqa: E402
from test_gguf import write_gguf  # noqa: E402

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
    uses: Mapping[str, Callable[[Path], Any]]
    """What reads its files, by their pattern: of a damaged one it is refused, or comes to the same all the same."""


def make_works(base: Path) -> dict[str, Work]:
    """All of them, with the models they need below a folder."""
    chat = save_chat_model(base / "chat")
    return {
        "train": _training(base),
        "bench": _benchmark(base, chat),
        "datastore build": _building(chat),
        "adapter save": _saving(chat),
        "cache conversion": _converting(base, chat),
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
        best = folder / "run" / "best"
        return [(best / name).read_bytes() for name in ("adapter.safetensors", "calibration.json")]

    def resumed(folder: Path) -> Any:
        act(folder)
        rows = read_metrics(folder / "run" / METRICS)
        return result(folder), [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]

    def once_more(folder: Path) -> Any:
        """A training that takes the target's states and answers from the one before it."""
        shutil.rmtree(folder / "run" / "best")
        for name in (STATE, METRICS):
            (folder / "run" / name).unlink()
        act(folder)
        return result(folder)

    texts = _writing(base / "target", "What does Ada eat?")
    uses = {STATE: resumed, METRICS: resumed, WRITTEN: once_more, "states/*/*": once_more, "best/*.json": texts}
    return Work(act, lambda folder: None, result, {f"run/{name}": use for name, use in uses.items()})


def _writing(target: Path, prompt: str) -> Callable[[Path], Any]:
    """What is written with the adapter that lies in a folder, or in its run: by all that it says, and by itself."""
    plain = load(str(target), drafter="none", dtype=torch.float64)

    def texts(folder: Path) -> Any:
        adapter = next(path for path in (folder / "run" / "best", folder) if path.is_dir())
        costs = {"draft_cost": 0.1, "start_cost": 0.0}
        drafting = [
            plain.with_drafter("kangaroo", adapter=adapter, **given) for given in ({}, {"stop": "auto"} | costs)
        ]
        return [decoder.generate([prompt], max_tokens=16)[0].tokens for decoder in drafting]

    return texts


def _benchmark(base: Path, chat: Path) -> Work:
    questions = base / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    bench_run.method_costs = lambda decoder: None  # type: ignore[attr-defined,assignment]

    def act(folder: Path) -> None:
        table = {"model": str(chat / "target"), "questions": str(questions), "output": str(folder / "run")}
        more = {"max_tokens": 8, "dtype": "float64", "threads": 1, "repeats": 2, "methods": [EARLY]}
        run_bench(parse_table(BenchRecipe, table | more, "faults"))

    def result(folder: Path) -> Any:
        return sorted(map(json.dumps, timeless(read_records(folder / "run"))))

    def reported(folder: Path) -> Any:
        (run,) = read_runs([folder / "run"])
        return result(folder), run.provenance["recipe"], run.provenance["fingerprint"]

    uses = {f"run/{name}": reported for name in (RECORDS, PROVENANCE)}
    return Work(act, lambda folder: None, result, uses)


def _building(chat: Path) -> Work:
    tokenizer = load_tokenizer(chat / "target")
    documents = [Document("d", text=f"{text} {number}") for number in range(400) for text in SENTENCES[:3]]

    def whole(folder: Path) -> None:
        if (folder / "x.rest").exists():
            assert Datastore.open(folder / "x.rest", tokenizer, 300).documents == len(documents)

    def content(folder: Path) -> Any:
        found = Datastore.open(folder / "x.rest", tokenizer, 300)
        return found.vocab_size, found.suffixes.tokens.tobytes(), found.suffixes.order.tobytes()

    return Work(
        lambda folder: build_datastore(documents, tokenizer, folder / "x.rest"),
        whole,
        content,
        {"x.rest": content},
    )


def _saving(chat: Path) -> Work:
    target = Target(load_model(chat / "target"))
    adapter = Adapter.load(chat / "adapter", target)

    def act(folder: Path) -> None:
        for turn in range(12):
            adapter.layers[0].norm_in.weight.data.fill_(turn + 1)
            adapter.save(folder, {"turn": turn})
        Calibration((0.1, 0.5, 0.9), (0.2, 0.5, 0.9), after_right=0.6).save(folder)

    def whole(folder: Path) -> None:
        if (folder / "config.json").exists():
            found = Adapter.load(folder, target)
            turn = json.loads((folder / "config.json").read_text())["provenance"]["turn"]
            assert (found.layers[0].norm_in.weight == turn + 1).all()

    uses = dict.fromkeys(("*.safetensors", "config.json", "calibration.json"), _writing(chat / "target", SENTENCES[0]))
    return Work(act, whole, lambda folder: (folder / "adapter.safetensors").read_bytes(), uses)


def _converting(base: Path, chat: Path) -> Work:
    """What the demo's model goes through, with a little model in the package's place."""
    source = write_gguf(base / "package.gguf", chat / "target")
    smollm2.find_package_file = lambda: source  # type: ignore[assignment]
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors

    def whole(folder: Path) -> None:
        if (folder / smollm2.NAME).exists():
            result(folder)

    def checked(folder: Path) -> Path:
        smollm2._check.cache_clear()  # as in another process
        return smollm2.smollm2(folder)

    def result(folder: Path) -> Any:
        assert checked(folder) == folder / smollm2.NAME
        return read_sealed(folder / smollm2.NAME / smollm2.DIGESTS, "digests", ModelError)

    def loaded(folder: Path) -> Any:
        decoder = load(str(checked(folder)), drafter="none", dtype=torch.float64, exact=False)
        return decoder.generate([SENTENCES[0]], max_tokens=8)[0].text

    return Work(lambda folder: smollm2.smollm2(folder), whole, result, {f"{smollm2.NAME}/*": loaded})


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


def copied(folder: Path, there: Path) -> Path:
    """A copy of a folder, in place of whatever lay there."""
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(folder, there)
    return there


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
