"""Where the fuzz happens: a little model with all that belongs to it, and what every case must keep to."""

import contextlib
import functools
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from chat_model import SENTENCES, save_chat_model
from command import invoke
from kangaroo import decoder as decoder_module
from kangaroo.decoder import Decoder, load
from kangaroo.documents import Document
from kangaroo.drafters.copying.datastore import build_datastore
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.errors import KangarooError
from kangaroo.loading import load_model, load_tokenizer

SLOW, LARGE = 10, 10**9
"""Seconds of computing that a case may take, and bytes that all of them together may leave behind."""
HANGING = 120
"""Seconds by the clock, for a case that waits for something: others may be using the machine."""


class Place:
    """A folder, and cases that are tried in it."""

    def __init__(self, folder: Path):
        self.folder = save_chat_model(folder)
        self.model = folder / "target"
        Calibration((0.1, 0.5, 0.9), (0.2, 0.5, 0.9), after_right=0.6).save(folder / "adapter")
        self.datastore = folder / "x.rest"
        documents = [Document("d", text=text) for text in SENTENCES[:3]]
        build_datastore(documents, load_tokenizer(self.model), self.datastore)
        (folder / "prompts.txt").write_text("Where?\nWhy?\n")
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
        self.decoder: Decoder = load(
            str(self.model), drafter="none", adapter=folder / "adapter", datastore=self.datastore
        )
        self.cases = 0
        self._process = psutil.Process()
        self._size = 0

    @contextlib.contextmanager
    def case(self) -> Iterator[None]:
        """One case: it may be refused, on one line; it may not fail, hang, or eat the machine."""
        self.cases += 1
        began, before = time.process_time(), signal.signal(signal.SIGALRM, _hanging)
        signal.alarm(HANGING)
        try:
            yield
        except KangarooError as error:
            message = str(error)
            assert message.strip(), "an error that says nothing"
            assert "\n" not in message.strip(), f"more than one line: {message!r}"
            assert len(message) < 3000, f"{len(message)} characters of error"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        seconds = time.process_time() - began
        assert seconds < SLOW, f"{seconds:.0f} s"
        size = self._process.memory_info().rss
        self._size = self._size or size
        assert size - self._size < LARGE, f"grew by {size - self._size} bytes"

    def command(self, *arguments: str) -> int:
        """A command line in this process. Of what it refuses it says why on one line, and exits with 2."""
        said, printed = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed), _nothing_typed():
            status = invoke(*arguments)
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        if status == 2 and arguments:
            assert len(errors) == 1, said.getvalue()
        else:
            assert not errors, errors
        assert status in (0, 1, 2), status
        return status

    def scratch(self, name: str, content: bytes) -> Path:
        """A file that lives for one case."""
        path = self.folder / "scratch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def copy_folder(self, name: str, changed: str, content: bytes) -> Path:
        """A folder of the model's with one file of another content."""
        there = self.folder / "scratch" / name
        there.mkdir(parents=True, exist_ok=True)
        for file in (self.folder / name).iterdir():
            (there / file.name).write_bytes(content if file.name == changed else file.read_bytes())
        return there


def _hanging(number: int, frame: FrameType | None) -> None:
    raise AssertionError("hangs")


@contextlib.contextmanager
def _nothing_typed() -> Iterator[None]:
    with Path(os.devnull).open() as nothing:
        saved, replaced = os.dup(0), nothing.fileno()
        os.dup2(replaced, 0)
        try:
            yield
        finally:
            os.dup2(saved, 0)
            os.close(saved)


@contextlib.contextmanager
def models_kept(place: Place) -> Iterator[None]:
    """Command lines of thousands of cases load the same little model once."""
    kept = functools.cache(load_model)

    def take(name: Any, *given: Any, **options: Any) -> Any:
        return (kept if str(name) == str(place.model) else load_model)(name, *given, **options)

    previous: Callable[..., Any] = decoder_module.load_model
    decoder_module.load_model = take  # type: ignore[attr-defined]
    try:
        yield
    finally:
        decoder_module.load_model = previous  # type: ignore[attr-defined]
