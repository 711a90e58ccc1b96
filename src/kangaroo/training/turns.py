"""Where a chat template puts the user's turn, and where a turn that a model samples there ends."""

import re
from dataclasses import dataclass
from typing import Any

from kangaroo.documents import Document, apply_template
from kangaroo.errors import DataError

MARK = "kangaroo-user-turn"
SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s|$)|[。！？]""")


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Token id -> text of the tokens that no turn holds: they end it."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


@dataclass(frozen=True, slots=True)
class Frame:
    """What a chat template puts around the first turn of a user."""

    before: str
    after: str
    """Up to where the answer begins."""
    stop: str
    """Text that ends a turn; empty where a special token does, or nothing."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """That of a tokenizer's own template. Raises DataError if a turn does not appear in it once, as it is."""
        document = Document("synthesis", where="[synthesis]")
        text = apply_template(document, tokenizer, [{"role": "user", "content": MARK}], prompt=True)
        if text.count(MARK) != 1:
            raise DataError(
                f"[synthesis]: the chat template shows what a user says {text.count(MARK)} times instead of once, so "
                "that there is no place for the target to say it; give documents with --data"
            )
        before, after = text.split(MARK)
        return cls(before, after, _stop(after, tokenizer))

    def turn(self, text: str, *, ended: bool) -> str:
        """The turn in a sampled text; one that was not `ended`, and has no end of its own, is cut."""
        if self.stop and self.stop in text:
            text, ended = text[: text.index(self.stop)], True
        return text.strip() if ended else cut(text)


def _stop(after: str, tokenizer: Any) -> str:
    line = after.strip().split("\n")[0]
    for special in special_tokens(tokenizer).values():
        line = line.split(special)[0]
    return line.strip()


def cut(text: str) -> str:
    """A text that breaks off, up to its last whole sentence; without one, up to its last whole word."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if ends:
        return text[: ends[-1]].strip()
    words = text.rsplit(maxsplit=1)
    return words[0].strip() if words else ""
