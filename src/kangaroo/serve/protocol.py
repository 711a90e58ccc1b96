"""Requests as OpenAI's clients send them, checked: a field is honoured, refused by name, or unknown to OpenAI too."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kangaroo.arguments import Arguments
from kangaroo.checks import shown
from kangaroo.constraints import Processor
from kangaroo.errors import ConfigError, KangarooError
from kangaroo.grammar import grammar_from_response_format, grammar_from_structured_outputs
from kangaroo.logprobs import Logprobs
from kangaroo.sampling import Sampling
from kangaroo.serve.refusals import Refusal, refused
from kangaroo.text import Prompt, Tokenizer

MOST_CHOICES = 128
"""Answers that one request may ask for, over all its prompts."""
MOST_CANDIDATES = 20
MOST_STOPS = 64
LONGEST_NAME = 64
"""Characters of a field's name, where a request has made one up, that an error repeats."""
MOST_ENTRIES = 1024
"""Of `logit_bias` and of `stop_token_ids`."""
DEFAULT_TOKENS = 16
"""Of `/v1/completions` without `max_tokens`, as at OpenAI; a chat is answered up to the end of its context."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Fields that would change the text and are not supported, with the values that say nothing."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles that are understood, and what a chat template is given for each."""

_Quick = Field(fail_fast=True)  # a list of a million wrong entries is one error
Texts = Annotated[list[str], _Quick]
Ids = Annotated[list[int], _Quick]
IdLists = Annotated[list[Ids], _Quick]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool | None = None


class Speculation(_Strict):
    """`speculation`, an extension: whether to draft and with what, and what the answer is to say of it."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    drafter: str | None = None
    max_draft: int | None = None
    statistics: bool = False
    tokens: bool = False


class Message(_Strict):
    """One message of a conversation; content is text, or parts of type "text"."""

    role: str
    content: str | Annotated[list[dict[str, Any]], _Quick] | None = None
    name: str | None = None


class Asked(_Strict):
    """What both kinds of completion take. Null stands for the default everywhere."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | Texts | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    speculation: Speculation | None = None

    @property
    def wants(self) -> Speculation:
        """The extension's switches."""
        return self.speculation or Speculation()

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def prompts(self) -> list[Prompt]:
        """Prompts to answer, in order."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """New tokens at most; None for as many as there is room for."""
        raise NotImplementedError

    @property
    def candidates(self) -> Logprobs | None:
        """The log-probabilities to return: of the model's own logits, as OpenAI's are."""
        raise NotImplementedError


class TextRequest(Asked):
    """The body of `/v1/completions`."""

    prompt: str | Texts | Ids | IdLists
    logprobs: int | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """One text or list of ids, or several."""
        given: Any = self.prompt
        if given == []:
            raise Refusal(400, "prompt must hold at least one text or token id, got none", "prompt")
        single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
        return [given] if single else list(given)

    @property
    def limit(self) -> int | None:
        """OpenAI's default where nothing is given."""
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def candidates(self) -> Logprobs | None:
        """So many at every position."""
        return None if self.logprobs is None else _candidates("logprobs", self.logprobs)


class ChatRequest(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], _Quick]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation."""
        if not self.messages:
            raise Refusal(400, "messages must hold at least one message, got none", "messages")
        return [[_message(place, message) for place, message in enumerate(self.messages)]]

    @property
    def limit(self) -> int | None:
        """Under either of its names."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Refusal(400, "max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def candidates(self) -> Logprobs | None:
        """With `logprobs`, `top_logprobs` at every position."""
        if not self.logprobs:
            if self.top_logprobs:
                raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")
            return None
        return _candidates("top_logprobs", self.top_logprobs or 0)


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request, as an Engine takes it."""

    prompts: list[Prompt]
    n: int
    sampling: Sampling
    limit: int | None
    """New tokens at most; None for as many as there is room for."""
    arguments: dict[str, Any]
    """The other arguments of `Engine.submit`."""
    format: Mapping[str, Any] | None = None
    """What the answer is to look like, by OpenAI's field or by vLLM's."""
    structured: Mapping[str, Any] | None = None

    def processor(self, tokenizer: Tokenizer, ends: Sequence[int]) -> Processor | None:
        """Holds the answer to it. Raises Refusal for a grammar that cannot be."""
        name = "response_format" if self.structured is None else "structured_outputs"
        try:
            if self.structured is not None:
                return grammar_from_structured_outputs(self.structured, tokenizer, ends)
            return None if self.format is None else grammar_from_response_format(self.format, tokenizer, ends)
        except KangarooError as error:
            raise Refusal(400, str(error), name) from None


Kind = TypeVar("Kind", bound=Asked)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. Raises Refusal, naming the field, for what is none."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    for name, value in (asked.model_extra or {}).items():
        if name in REFUSED and value is not None and value not in REFUSED[name]:
            raise Refusal(400, f"{name} is not supported: leave it out", name, "unsupported_parameter")
    return asked


def to_call(asked: Asked) -> Call:
    """What the request asks of an engine. Raises Refusal for values that cannot be."""
    n = 1 if asked.n is None else asked.n
    prompts = asked.prompts
    if not 1 <= n <= MOST_CHOICES or n * len(prompts) > MOST_CHOICES:
        at_most = f"a request may have {MOST_CHOICES} answers at most"
        raise Refusal(400, f"n must be at least 1 and {at_most}, got {n} for {len(prompts)} prompts", "n")
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options is only for stream: true", "stream_options")
    stop: Sequence[str] = [asked.stop] if isinstance(asked.stop, str) else asked.stop or ()
    for name, given, most in (
        ("stop", stop, MOST_STOPS),
        ("stop_token_ids", asked.stop_token_ids or (), MOST_ENTRIES),
        ("logit_bias", asked.logit_bias or {}, MOST_ENTRIES),
    ):
        if len(given) > most:
            raise Refusal(400, f"{name} may have {most} entries at most, got {len(given)}", name)
    arguments: dict[str, Any] = {
        "min_tokens": asked.min_tokens or 0,
        "stop": stop,
        "stop_token_ids": asked.stop_token_ids or (),
        "ignore_eos": bool(asked.ignore_eos),
        "logprobs": asked.candidates,
        "speculate": asked.wants.enabled,
        "max_draft": asked.wants.max_draft,
    }
    try:
        Arguments(**arguments)
    except ConfigError as error:
        raise refused(error, fields_of(type(asked))) from None
    arguments["drafter"] = asked.wants.drafter
    plain = asked.response_format in (None, {"type": "text"})
    if not plain and asked.structured_outputs is not None:
        raise Refusal(400, "response_format and structured_outputs are both given: leave one out", "structured_outputs")
    rules = (asked.response_format, asked.structured_outputs)
    return Call(prompts, n, _sampling(asked), asked.limit, arguments, *rules)


def fields_of(kind: type[Asked]) -> dict[str, str]:
    """The fields that an engine's settings are given in, by the names of these."""
    own = {name: name for name in kind.model_fields}
    return own | {name: f"speculation.{name}" for name in ("drafter", "max_draft")}


def _sampling(asked: Asked) -> Sampling:
    """Temperature 1 unless given, as OpenAI's clients expect, and without a seed one that nobody knows."""
    names = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    temperature = 1.0 if asked.temperature is None else asked.temperature
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    top_k = None if asked.top_k in (None, 0, -1) else asked.top_k  # both say "all of them" in other servers
    try:
        return Sampling(temperature=temperature, seed=seed, top_k=top_k, **given)
    except ConfigError as error:
        raise refused(error, fields_of(type(asked))) from None


def _candidates(name: str, top: int) -> Logprobs:
    if not 0 <= top <= MOST_CANDIDATES:
        raise Refusal(400, f"{name} must be in 0..{MOST_CANDIDATES}, got {shown(top)}", name)
    return Logprobs(top, raw=True)


def _message(place: int, message: Message) -> dict[str, str]:
    """The message as a chat template takes it."""
    where = f"messages.{place}"
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        raise Refusal(400, f"{where}.role must be one of {known}, got {shown(message.role)}", f"{where}.role")
    extra = message.model_extra or {}
    for name, value in (("name", message.name), *((name, extra.get(name)) for name in _OF_MESSAGES)):
        if value:
            raise Refusal(400, f"{where}.{name} is not supported: leave it out", f"{where}.{name}")
    content = message.content
    if content is None:
        raise Refusal(400, f"{where}.content must be text", f"{where}.content")
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content.{index}", part) for index, part in enumerate(content))
    return {"role": ROLES[message.role], "content": content}


_OF_MESSAGES = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal")


def _part(where: str, part: dict[str, Any]) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise Refusal(400, f"{where}: parts of type {shown(kind)} are not supported, only text", f"{where}.type")
    if not isinstance(text, str):
        raise Refusal(400, f"{where}.text must be text, got {shown(text)}", f"{where}.text")
    return text


def _invalid(error: ValidationError) -> Refusal:
    """What is wrong with the first field at fault, in one line; of a field of several types, what each expected."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    where = _param(details[0]["loc"])
    reasons = dict.fromkeys(each["msg"] for each in details if _param(each["loc"]) == where)
    message = " or ".join(reasons).replace("Input should be", "should be")
    return Refusal(400, f"{where}: {message}" if where else f"the body is no request: {message}", where or None)


def _param(loc: tuple[int | str, ...]) -> str:
    """The path to a field, without pydantic's tags for the members of a union and what follows them."""
    path = list[str]()
    for part in loc:
        if (isinstance(part, str) and not part.isidentifier()) or part in ("str", "int"):
            break
        path.append(str(part)[:LONGEST_NAME])
    return ".".join(path)
