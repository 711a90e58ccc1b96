"""All methods on a few questions, in turn: what is asked, in which order, and how the answers compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kangaroo.bench.check import find_divergence
from kangaroo.bench.compare import without_end
from kangaroo.bench.methods import Method
from kangaroo.bench.questions import Messages, Question
from kangaroo.bench.recipe import BenchRecipe
from kangaroo.bench.records import BASELINE, Difference, Measured, Record, Turn
from kangaroo.bench.shorten import Fitted, bring_to, fit, material_for
from kangaroo.decoder import Decoder
from kangaroo.errors import ConfigError
from kangaroo.sampling import Sampling

WARM_UP = 16
"""Tokens of the untimed answer to a prompt of a length that a method has not met; its very first is a whole answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A turn's prompt and one method's answer."""

    prompt: Fitted
    measured: Measured


class Asker:
    """Puts questions to all methods of a recipe, on one target."""

    def __init__(
        self, decoder: Decoder, methods: Mapping[str, Method], recipe: BenchRecipe, questions: Sequence[Question] = ()
    ):
        """`decoder` is any on the target; `questions` are all there are, to lengthen the prompts of others.

        Raises ConfigError if answers may be so long that no prompt fits.
        """
        self._decoder, self._methods, self._recipe = decoder, dict(methods), recipe
        self._room = decoder.target.context - recipe.max_tokens
        if self._room < 1:
            raise ConfigError(
                f"max_tokens is {recipe.max_tokens}, which leaves no room for a prompt in a context of "
                f"{decoder.target.context} tokens"
            )
        if recipe.prompt_tokens is not None and recipe.prompt_tokens > self._room:
            raise ConfigError(
                f"prompt_tokens is {recipe.prompt_tokens}, but only {self._room} leave room for max_tokens"
            )
        self._questions = questions
        self._drawn = recipe.drawn
        self._met: set[tuple[str, int, int]] = set()

    def ask(self, questions: Sequence[Question], repeat: int, rotation: int) -> list[Record]:
        """Every method's answers to a batch of questions; the method that goes first changes with `rotation`."""
        names = list(self._methods)
        first = rotation % len(names)
        sampling = self._recipe.sampled(repeat)
        if self._recipe.end == "barred":
            sampling = without_end(sampling, self._decoder.eos)
        asked = {name: self._converse(name, questions, sampling) for name in (*names[first:], *names[:first])}
        return [
            Record(
                question=question.id,
                task=question.task,
                category=question.category,
                method=name,
                repeat=repeat,
                exactness=self._decoder.target.exactness.level,
                turns=[
                    self._turn(mine, plain, None if name in self._drawn else sampling)
                    for mine, plain in zip(asked[name][row], asked[BASELINE][row], strict=True)
                ],
            )
            for row, question in enumerate(questions)
            for name in names
        ]

    def _converse(self, name: str, questions: Sequence[Question], sampling: Sampling) -> list[list[Asked]]:
        """One method's answers to all turns, per question; later turns follow the method's own answers."""
        asked: list[list[Asked]] = [[] for _ in questions]
        tokenizer = self._decoder.tokenizer
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [row for row, question in enumerate(questions) if len(question.turns) > turn]
            texts = [[tokenizer.decode(before.measured.tokens) for before in asked[row]] for row in rows]
            prompts = [
                self._prompt(questions[row], questions[row].conversation(said))
                for row, said in zip(rows, texts, strict=True)
            ]
            with _Named(name, [questions[row] for row in rows]):
                answers = self._answer(name, [prompt.tokens for prompt in prompts], sampling)
            for row, prompt, measured in zip(rows, prompts, answers, strict=True):
                asked[row].append(Asked(prompt, measured))
        return asked

    def _prompt(self, question: Question, messages: Messages) -> Fitted:
        length, tokenizer = self._recipe.prompt_tokens, self._decoder.tokenizer
        if length is None:
            return fit(messages, tokenizer, self._room)
        return bring_to(length, messages, tokenizer, material_for(question, self._questions or [question]))

    def _answer(self, name: str, prompts: Sequence[list[int]], sampling: Sampling) -> list[Measured]:
        method, limit = self._methods[name], self._recipe.max_tokens
        shape = (name, len(prompts), max(map(len, prompts)))
        if shape not in self._met:
            known = any(met[0] == name for met in self._met)
            method.answer(prompts, sampling, min(limit, WARM_UP) if known else limit)
            self._met.add(shape)
        return method.answer(prompts, sampling, limit)

    def _turn(self, mine: Asked, plain: Asked, sampling: Sampling | None) -> Turn:
        """Without a `sampling`, the text is not meant to be plain decoding's, and is not compared."""
        difference = None
        # After a first difference a conversation goes on from another prompt, where there is nothing to compare.
        same = mine.measured.tokens == plain.measured.tokens
        if sampling is not None and not same and mine.prompt.tokens == plain.prompt.tokens:
            texts = (plain.measured.tokens, mine.measured.tokens)
            found = find_divergence(self._decoder, mine.prompt.tokens, *texts, sampling)
            difference = Difference(position=found.position, gap=found.gap, tie=found.is_tie)
        prompt = mine.prompt
        return Turn(
            prompt_tokens=len(prompt.tokens),
            dropped_tokens=prompt.dropped,
            difference=difference,
            **dict(mine.measured),
        )


class _Named:
    """Says in any error that passes through it which method was answering what."""

    def __init__(self, method: str, questions: Sequence[Question]):
        self._note = f"while {method} was answering question {', '.join(str(question.id) for question in questions)}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self._note)
