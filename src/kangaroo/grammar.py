"""Structured output: a grammar that the text follows, as a processor that drafts respect too (llguidance).

A grammar is a JSON schema, a regular expression, a list of choices, or rules in Lark's notation. llguidance compiles it
and says which tokens may follow a text. A text is followed from where an earlier call has left off, so that a drafted
token costs its own step and not a new parse of the whole answer.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import takewhile
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kangaroo.checks import shown
from kangaroo.constraints import Processor
from kangaroo.errors import ConfigError, ModelError
from kangaroo.text import Tokenizer

KINDS = ("json_schema", "regex", "choice", "lark")
AS_PYTHON_WRITES_IT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write every JSON value: what a grammar leaves open, a small model may fill with blanks for ever."""
FOLLOWED, REMEMBERED = 32, 256
"""Texts followed at a time, and answers kept, at most: a batch may share a grammar, and a node is asked for twice."""
FAR = 64
"""Tokens to go back by, beyond which it is another text that is to be followed."""
DEAD_END = "NoExtensionBias"


class Grammar:
    """Lets a text be what a grammar describes, and end only where that is complete; where nothing else may follow, it
    has to end.

    It is given as `processor`, to one request or to several. `ends` are the tokens that end a text. Raises ConfigError
    for a grammar that cannot be compiled or that no text follows, ModelError for a tokenizer that llguidance cannot
    take.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        lark: str | None = None,
    ):
        """One of the four; `json_schema` may be JSON text. JSON is written as Python's json.dumps does."""
        given = {"json_schema": json_schema, "regex": regex, "choice": choice, "lark": lark}
        chosen = [kind for kind in KINDS if given[kind] is not None]
        if len(chosen) != 1:
            raise ConfigError(f"a grammar is one of {', '.join(KINDS)}, got {' and '.join(chosen) or 'none'}")
        self.kind = chosen[0]
        try:
            rules = _rules(self.kind, given[self.kind])
        except ValueError as error:  # half of a surrogate pair; numbers and depths beyond what it reads
            raise ConfigError(f"{self.kind} cannot be compiled: {_reason(str(error))}") from None
        self._ends = tuple(ends)
        self._vocabulary = _vocabulary(tokenizer, self._ends)
        is_error, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(rules, self._vocabulary)
        if is_error:
            raise ConfigError(f"{self.kind} cannot be compiled: {_reason(messages[0])}")
        self._beginning = _llguidance().LLMatcher(self._vocabulary, rules, log_level=0)
        self._followed = list[_Followed]()
        self._masks = OrderedDict[tuple[int, ...], np.ndarray | None]()
        self._lock = Lock()  # a request may be checked while another is answered
        first = self._allowed(())
        if first is None or not first.any():
            raise ConfigError(f"{self.kind} describes no text at all: {shown(given[self.kind])}")

    def __repr__(self) -> str:
        return f"Grammar({self.kind})"

    def __call__(self, prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        """Scores [V] with what the grammar does not let follow at -inf; unchanged after an output that it forbids."""
        allowed = self._allowed(tuple(output))
        if allowed is None:  # a node that will be refused
            return scores
        # A model may have more entries than its tokenizer has tokens, or fewer.
        barred = torch.ones(len(scores), dtype=torch.bool)
        known = min(len(scores), len(allowed))
        barred[:known] = torch.from_numpy(~allowed[:known])
        return scores.masked_fill_(barred.to(scores.device), -torch.inf)

    def go_on(self, output: Sequence[int], drafted: Sequence[int] = ()) -> list[int]:
        """What is worth drafting after an output: `drafted` as far as it is allowed, then what is forced from there."""
        text, kept = tuple(output), list(takewhile(lambda token: token not in self._ends, drafted))
        if not set(self._ends).isdisjoint(text):
            return []
        with self._lock:
            followed, read = self._follow((*text, *kept))
            if read < len(text):
                return []
            if read == len(text) + len(kept) < len(text) + len(drafted) and followed.matcher.is_accepting():
                return [*kept, drafted[len(kept)]]  # the draft's end is one
            kept = [*kept[: read - len(text)], *followed.matcher.compute_ff_tokens()]
            followed, _ = self._follow((*text, *kept))
            done = followed.matcher.is_stopped() and followed.matcher.is_accepting()
            return [*kept, *self._ends] if done and len(self._ends) == 1 else kept

    def _allowed(self, output: tuple[int, ...]) -> np.ndarray | None:
        """[V] bool: which tokens may follow; None after an output that the grammar forbids."""
        with self._lock:
            if output not in self._masks:
                self._masks[output] = self._find(output)
            self._masks.move_to_end(output)
            if len(self._masks) > REMEMBERED:
                self._masks.popitem(last=False)
            packed = self._masks[output]
        if packed is None:
            return None
        return np.unpackbits(packed, bitorder="little").view(np.bool_)

    def _find(self, output: tuple[int, ...]) -> np.ndarray | None:
        """The same, eight tokens a byte."""
        bits = np.zeros(self._vocabulary.vocab_size, dtype=np.uint8)
        may_end = not set(self._ends).isdisjoint(output)  # after an end come only ends, for who writes on past it
        if not may_end:
            followed, read = self._follow(output)
            if read < len(output):
                return None
            packed = np.frombuffer(followed.matcher.compute_bitmask(), dtype=np.uint8)
            bits[:] = np.unpackbits(packed, bitorder="little")[: len(bits)]
            may_end = followed.matcher.is_accepting()
            self._check(followed)
        bits[list(self._ends)] = may_end
        return np.packbits(bits, bitorder="little")

    def _follow(self, output: tuple[int, ...]) -> "tuple[_Followed, int]":
        """A text that has come as far as this output, or as far as it is allowed, and how far that is."""
        best = max(self._followed, key=lambda followed: followed.shared(output), default=None)
        if best is None or len(best.path) - best.shared(output) > FAR:
            best = _Followed(self._beginning.deep_copy())
            del self._followed[: len(self._followed) + 1 - FOLLOWED]
        else:
            self._followed.remove(best)
        self._followed.append(best)  # the one used last stands last
        best.go_to(output, self._vocabulary.vocab_size)
        self._check(best)
        return best, len(best.path)

    def _check(self, followed: "_Followed") -> None:
        """Raise ConfigError for a grammar that takes more than it may; let go of what is at an end it cannot leave."""
        if followed.matcher.is_error():
            self._followed.remove(followed)
            reason = _reason(followed.matcher.get_error())
            if reason != DEAD_END:
                raise ConfigError(f"{self.kind} is too complex to be followed further, make it simpler: {reason}")


class _Followed:
    """A matcher, and the tokens it has read."""

    def __init__(self, matcher: Any):
        self.matcher: Any = matcher
        self.path: tuple[int, ...] = ()

    def shared(self, output: tuple[int, ...]) -> int:
        """How many tokens this text and an output begin with alike."""
        most = min(len(self.path), len(output))
        if self.path[:most] == output[:most]:
            return most
        return next(i for i in range(most) if self.path[i] != output[i])

    def go_to(self, output: tuple[int, ...], vocab_size: int) -> None:
        """Read an output, as far as it is allowed."""
        shared = self.shared(output)
        if shared < len(self.path):
            assert self.matcher.rollback(len(self.path) - shared), self.matcher.get_error()
        new = list(output[shared:])
        readable = next((i for i, token in enumerate(new) if not 0 <= token < vocab_size), len(new))
        self.path = output[: shared + self.matcher.try_consume_tokens(new[:readable])]


def grammar_from_response_format(
    response_format: Mapping[str, Any], tokenizer: Tokenizer, ends: Sequence[int]
) -> Processor | None:
    """The grammar that OpenAI's `response_format` asks for, or None if it asks for none.

    Its types are text, json_object, and json_schema with {"json_schema": {"name", "schema", "strict"}}; the schema is
    kept to whether `strict` is true or not. Raises ConfigError.
    """
    kind = _field(response_format, "response_format", "type", str)
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(tokenizer, ends, json_schema={"type": "object"})
    if kind != "json_schema":
        raise ConfigError(f"response_format.type is text, json_object or json_schema, got {shown(kind)}")
    inner = _field(response_format, "response_format", "json_schema", Mapping)
    return Grammar(tokenizer, ends, json_schema=_field(inner, "response_format.json_schema", "schema", Mapping))


def grammar_from_structured_outputs(fields: Mapping[str, Any], tokenizer: Tokenizer, ends: Sequence[int]) -> Grammar:
    """The grammar of a field `structured_outputs`, as vLLM names it: one of json, json_object, regex, choice, grammar.

    `json` is a schema, `grammar` is in Lark's notation. Raises ConfigError.
    """
    names = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}
    given = {name: value for name, value in fields.items() if value is not None and value is not False}
    unknown = sorted(given.keys() - names.keys() - {"json_object"})
    if unknown or len(given) != 1:
        got = unknown[0] if unknown else " and ".join(sorted(given)) or "none"
        raise ConfigError(f"structured_outputs takes one of {', '.join(names)}, json_object; got {got}")
    if "json_object" in given:
        return Grammar(tokenizer, ends, json_schema={"type": "object"})
    name, value = next(iter(given.items()))
    return Grammar(tokenizer, ends, **{names[name]: value})


def _field(mapping: Mapping[str, Any], where: str, name: str, kind: type) -> Any:
    wanted = "a text" if kind is str else "an object"
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where} must be an object, got {shown(mapping)}")
    if not isinstance(mapping.get(name), kind):
        raise ConfigError(f"{where}.{name} must be {wanted}, got {shown(mapping.get(name))}")
    return mapping[name]


def _rules(kind: str, given: Any) -> str:
    """A grammar as llguidance reads it. Raises ConfigError for what is none by its type, ValueError beyond what it can
    read."""
    matcher = _llguidance().LLMatcher
    if kind == "json_schema":
        return str(matcher.grammar_from_json_schema(_schema_text(given), defaults=AS_PYTHON_WRITES_IT))
    if kind == "choice":
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ConfigError(f"choice is a list of texts, got {shown(given)}")
        if any(not isinstance(text, str) for text in given):
            raise ConfigError(f"choice is a list of texts, got {shown(given)}")
        return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in given)))
    if not isinstance(given, str):
        raise ConfigError(f"{kind} is a text, got {shown(given)}")
    return str(matcher.grammar_from_regex(given) if kind == "regex" else matcher.grammar_from_lark(given))


def _schema_text(schema: Any) -> str:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(parsed, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema is not JSON: {_reason(str(error))}") from None
    if not isinstance(parsed, Mapping):
        raise ConfigError(f"json_schema must be an object, got {shown(parsed)}")
    return text


def _reason(message: str) -> str:
    """The line that says what is wrong, of a message that may also draw where."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join((named or lines)[0].split())


def _llguidance() -> Any:
    try:
        return import_module("llguidance")
    except ImportError:
        raise ConfigError("a grammar needs the grammar extra: pip install 'kangaroo-decoding[grammar]'") from None


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, ends: tuple[int, ...]) -> Any:
    """A tokenizer as llguidance holds it, which takes a moment to make for a large one."""
    if not ends:
        raise ConfigError("a grammar needs a token that ends the text, and the model has none: name one as its end")
    _llguidance()
    try:
        return import_module("llguidance.hf").from_tokenizer(tokenizer.wrapped, eos_token=list(ends))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"grammars cannot be used with this model's tokenizer: {_reason(str(error))}") from None
