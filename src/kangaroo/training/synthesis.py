"""Training text from nothing but the target, which writes the user's turns and answers them.

The method is Magpie's (Xu et al. 2024, arXiv 2406.08464): a chat model that is given its template up to where a user
would speak goes on as the user. A target without a template goes on from the beginning of a text.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kangaroo.documents import Document, apply_template, read_documents
from kangaroo.errors import ConfigError, DataError
from kangaroo.files import write_text
from kangaroo.inputs import is_file
from kangaroo.loading import end_tokens
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.text import Tokenizer
from kangaroo.training.recipe import FrozenTargetRecipe
from kangaroo.training.report import Stage, TrainingReport
from kangaroo.training.target_text import Writer

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


SYNTHESISED, SAMPLED, ANSWERED = "synthesised.jsonl", "synthesised-sampled.jsonl", "synthesised-answered.jsonl"


class Synthesis:
    """Writes the documents of a run whose recipe has a synthesis section.

    Raises ConfigError if the documents would not fit the run's sequences, or a setting has nothing to set; DataError
    for a template without a place for the user's turn, and for a tokenizer without a token to begin from.
    """

    def __init__(self, target: Target, tokenizer: Any, recipe: FrozenTargetRecipe, report: TrainingReport):
        assert recipe.synthesis is not None, "the recipe has the section"
        self.settings, self.recipe = recipe.synthesis, recipe
        self.target, self.tokenizer, self.report = target, Tokenizer(tokenizer), report
        self.frame = Frame.of(tokenizer) if self.tokenizer.has_chat_template else None
        self.first = self._first()
        self._check_settings()

    @property
    def digest(self) -> str:
        """SHA-256 of all that the documents depend on."""
        settings = self.settings.model_dump(exclude={"batch"})
        template = str(self.tokenizer.wrapped.chat_template)
        content = json.dumps([settings, self.recipe.seed, self.target.fingerprint, template])
        return hashlib.sha256(content.encode()).hexdigest()

    def files(self) -> list[Path]:
        """One file with the documents, as `read_documents` reads it; one made for the same digest is taken as it is.

        Raises DataError if too few documents are left to hold some out and train on the others.
        """
        path, source = self.recipe.output / SYNTHESISED, f"synthesis {self.digest[:16]}"
        first = next(read_documents(path), None) if is_file(path) else None
        if first is not None and first.source == source:
            return [path]
        rows = self._texts() if self.frame is None else self._conversations(self.frame)
        self._check_enough(len(rows))
        text = "".join(json.dumps({"source": source, **row}, ensure_ascii=False) + "\n" for row in rows)
        write_text(path, text)
        for made in (SAMPLED, ANSWERED):
            (self.recipe.output / made).unlink(missing_ok=True)
        return [path]

    def _texts(self) -> list[dict[str, Any]]:
        written = self._sample("write", self.settings.max_tokens)
        return [{"text": text} for text in dict.fromkeys(text.strip() for text, _ in written) if text]

    def _conversations(self, frame: Frame) -> list[dict[str, Any]]:
        # The same turn twice would have the same greedy answer, and might be held out and trained on.
        sampled = self._sample("ask", self.settings.prompt_tokens)
        turns = dict.fromkeys(frame.turn(text, ended=ended) for text, ended in sampled)
        asked = [[{"role": "user", "content": turn}] for turn in turns if turn]
        self._check_enough(len(asked))
        prompts = [self.tokenizer.encode(messages) for messages in asked]
        answers = [self.tokenizer.decode(answer).strip() for answer in self._answer(prompts)]
        said = [{"role": "assistant", "content": answer} for answer in answers]
        return [{"messages": [*m, a]} for m, a in zip(asked, said, strict=True) if a["content"]]

    def _sample(self, stage: Stage, max_tokens: int) -> list[tuple[str, bool]]:
        """(text, whether it came to its end) of every document: what follows the first tokens."""
        specials = special_tokens(self.tokenizer.wrapped)
        ends = {*specials, *end_tokens(self.target.model)}
        rows = range(self.settings.documents)
        requests = [Request(self.first, self._sampling(self.settings.temperature, i), max_tokens) for i in rows]
        writer = Writer(self.target, sorted(ends), self.settings.batch, self.report)
        written = writer.answer(stage, requests, self.recipe.output / SAMPLED)
        return [(self.tokenizer.decode([t for t in tokens if t not in ends]), tokens[-1] in ends) for tokens in written]

    def _answer(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        # Noise of their own: turns have the indices from 0 on. Prompts of like length together, as a batch is padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        first, temperature = self.settings.documents, self.settings.answer_temperature
        requests = [
            Request(prompts[i], self._sampling(temperature, first + i), self.settings.max_tokens) for i in order
        ]
        writer = Writer(self.target, end_tokens(self.target.model), self.settings.batch, self.report)
        written = writer.answer("reply", requests, self.recipe.output / ANSWERED)
        answers = dict(zip(order, written, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _sampling(self, temperature: float, index: int) -> Sampling:
        return Sampling(temperature=temperature, seed=self.recipe.seed, index=index)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _first(self) -> list[int]:
        """What every document begins with: the template before the user's turn, or the token that begins a text."""
        # A space that a word may follow belongs to the word's own token.
        opening = [] if self.frame is None else self._encode(self.frame.before.rstrip(" "))
        if opening:
            return opening
        tokenizer = self.tokenizer.wrapped
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise DataError(
                f"[synthesis]: {self.recipe.target} has neither a chat template nor a token that begins or ends "
                "texts, so there is nothing to begin from; give documents with --data"
            )
        return [begin]

    def _check_settings(self) -> None:
        settings, longest = self.settings, self.recipe.schedule.longest
        if self.frame is None:
            for name in ("prompt_tokens", "answer_temperature"):
                if getattr(settings, name) != type(settings).model_fields[name].default:
                    raise ConfigError(
                        f"synthesis.{name} is for conversations, but {self.recipe.target} has no chat template; drop it"
                    )
            needed, shown = len(self.first) + settings.max_tokens, "max_tokens"
        else:
            around = len(self._encode(self.frame.before + self.frame.after))
            needed = around + settings.prompt_tokens + settings.max_tokens
            shown = f"prompt_tokens + max_tokens + {around} of the chat template"
        if needed > longest:
            raise ConfigError(
                f"synthesis: documents of {needed} tokens ({shown}) exceed the run's longest sequence of {longest}; "
                "lower the one or raise the other (schedule.sequence_length)"
            )

    def _check_enough(self, documents: int) -> None:
        held_out = self.recipe.data.held_out
        if documents <= held_out:
            raise DataError(
                f"of the {self.settings.documents} documents that the target wrote (synthesis.documents), {documents} "
                f"are left without the empty and the repeated: too few to hold out {held_out} (data.held_out)"
            )
