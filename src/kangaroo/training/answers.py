"""Text that the target writes itself: to evaluate on, and to learn from. Kept on disk as it is made."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kangaroo.decode import decode, start
from kangaroo.drafters.none import NoDrafter
from kangaroo.files import write_text
from kangaroo.model import Target
from kangaroo.state import Request
from kangaroo.training.report import Clock, Report, Stage


class Writer:
    """A frozen target that answers prompts. `eos` are the tokens that end its answers."""

    def __init__(self, target: Target, eos: Sequence[int], batch: int, report: Report):
        self.target, self.eos, self.batch, self.report = target, tuple(eos), batch, report

    def answer(self, stage: Stage, requests: Sequence[Request], path: Path) -> list[list[int]]:
        """The target's own answers, an end token included, without any drafting.

        What `path` holds of them already is not generated again; a file made by another target or for other requests
        is replaced.
        """
        header = {"requests": self._digest(requests)}
        answers = _read(path, header)
        clock = Clock(stage, len(answers), len(requests), self.report)
        text = "".join(json.dumps(row) + "\n" for row in [header, *answers])
        write_text(path, text)
        with path.open("a", encoding="utf-8") as file:
            for begin in range(len(answers), len(requests), self.batch):
                new = self._generate(requests[begin : begin + self.batch])
                file.write("".join(json.dumps(row) + "\n" for row in new))
                file.flush()
                answers += new
                clock.advance(len(answers), sum(map(len, new)))
        return answers

    def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        drafter = NoDrafter()
        state = start(self.target, drafter, requests, eos=self.eos)
        texts: list[list[int]] = [[] for _ in requests]
        for done in decode(self.target, drafter, state):
            for text, emitted in zip(texts, done.emitted, strict=True):
                text.extend(emitted)
        return texts

    def _digest(self, requests: Sequence[Request]) -> str:
        asked = [(list(r.prompt), r.max_tokens, repr(r.sampling)) for r in requests]
        content = json.dumps([self.target.fingerprint, self.eos, asked])
        return hashlib.sha256(content.encode()).hexdigest()


def _read(path: Path, header: dict[str, str]) -> list[list[int]]:
    if not path.is_file():
        return []
    # What follows the last newline is empty, or a row cut short by a kill.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return rows[1:] if rows and rows[0] == header else []
