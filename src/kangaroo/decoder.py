"""Prompts in, answers out: a target, a drafter and a tokenizer in one object."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import PreTrainedModel

from kangaroo import demo
from kangaroo.arguments import Arguments, Processors, Samplings, encode_all
from kangaroo.checks import need_whole
from kangaroo.completion import Completion
from kangaroo.constraints import Processor
from kangaroo.decode import check_request
from kangaroo.drafters import FILES, OF_ONE_TARGET, DrafterChoice, MakeDrafter, choose_drafter
from kangaroo.drafters.none import NoDrafter
from kangaroo.engine import Engine
from kangaroo.errors import ConfigError, DataError
from kangaroo.forced import forcing
from kangaroo.grammar import Grammar
from kangaroo.loading import end_tokens, load_model, load_tokenizer
from kangaroo.logprobs import Logprobs
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.streaming import AnswerStream, BatchStream
from kangaroo.text import Prompt, Tokenizer
from kangaroo.threads import set_threads


class Decoder:
    """Generates text with one target and one drafter.

    A text is a function of weights, prompt, Sampling and what a processor forbids: it is the same alone and in a batch,
    streamed and not, with any drafter and with none. One prompt with one Sampling, asked for twice in a call, is the
    exception that users expect: the second time it takes the next sample index (see `generate`).
    """

    def __init__(
        self,
        target: Target,
        make_drafter: MakeDrafter,
        tokenizer: Tokenizer,
        eos: Sequence[int],
        files: Mapping[str, str | Path] | None = None,
        *,
        drafter_name: str = "one's own",
        drafter: str | None = None,
        allow_other_target: bool = False,
    ):
        """`files` are those that came with the model: for drafters whose settings do not name their own. `drafter` is
        what is drafted with, in words: its name, unless more is to be said."""
        self.target, self.make_drafter, self.tokenizer, self.eos = target, make_drafter, tokenizer, tuple(eos)
        self.drafter_name, self.drafter = drafter_name, drafter or drafter_name
        self.files, self.allow_other_target = dict(files or {}), allow_other_target

    def __repr__(self) -> str:
        target = self.target
        kind = f"{target.config.model_type}, {target.num_layers} layers, {str(target.dtype).removeprefix('torch.')}"
        return f"Decoder({kind} on {target.device}; drafter: {self.drafter})"

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a Decoder can be neither pickled nor copied: load it there, with the same arguments")

    def with_drafter(self, drafter: DrafterChoice, /, **settings: Any) -> "Decoder":
        """The same target with another drafter: a name, a config, or a function that makes one for a target.

        Raises ConfigError, AdapterError or DataError.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        choice = choose_drafter(drafter, given)
        own: dict[str, Any] = {name: self.files[name] for name in choice.files if name in self.files}
        if self.allow_other_target and OF_ONE_TARGET & set(choice.files):
            own["allow_other_target"] = True
        make_drafter = choice.build(self.target, self.tokenizer.wrapped, own | dict(choice.settings))
        return Decoder(
            self.target,
            make_drafter,
            self.tokenizer,
            self.eos,
            self.files,
            drafter_name=choice.name,
            drafter=choice.described,
            allow_other_target=self.allow_other_target,
        )

    def engine(
        self,
        *,
        rows: int = 16,
        queue: int = 256,
        capacity: int | None = None,
        prefix_tokens: int = 4096,
        also: Sequence[DrafterChoice] = (),
    ) -> Engine:
        """An Engine that answers requests as they come; its arguments are described there.

        `also` are drafters that requests may choose instead of this one.
        """
        others = [self.with_drafter(choice) for choice in also]
        return Engine(self, rows=rows, queue=queue, capacity=capacity, prefix_tokens=prefix_tokens, also=others)

    def plain(self) -> "Decoder":
        """The same target without drafting: the baseline, on the same weights and kernels."""
        return self.with_drafter("none")

    def grammar(
        self,
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        lark: str | None = None,
    ) -> Grammar:
        """What answers are to follow, one of the four; give it as `processor`. Raises ConfigError or ModelError."""
        return Grammar(self.tokenizer, self.eos, json_schema=json_schema, regex=regex, choice=choice, lark=lark)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Samplings = None,
        n: int = 1,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: Logprobs | int | None = None,
        processor: Processors = None,
        rows: int | None = None,
    ) -> list[Completion]:
        """Complete a batch of prompts together: n answers to each, flat, prompt by prompt.

        The i-th answer to a prompt has the index of its Sampling plus i. A pair of prompt and Sampling that occurs
        again takes the next free indices, so no two answers are the same by accident; pairs that differ get what they
        would get alone. No answer ends before `min_tokens`, neither at an end nor at a stop string. `rows` is how many
        answers are written at once, the others waiting for their turn; None writes all of them.

        Raises DataError for prompts that are none, or a single one outside a list; ConfigError for other arguments;
        CapacityError if the batch does not fit in memory.
        """
        stream = self.stream_batch(
            prompts,
            sampling=sampling,
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            processor=processor,
            rows=rows,
        )
        for _ in stream:
            pass
        return [completion for completion in stream.completions if completion is not None]

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Samplings = None,
        n: int = 1,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: Logprobs | int | None = None,
        processor: Processors = None,
        rows: int | None = None,
    ) -> BatchStream:
        """The same answers as pieces, as they come. Errors in the arguments are raised here, before the first piece."""
        arguments = Arguments(
            sampling=sampling,
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            processor=processor,
        )
        if rows is not None and need_whole("rows", rows) < 1:
            raise ConfigError(f"rows is how many answers are written at once, at least 1, got {rows}")
        tokens = encode_all(prompts, self.tokenizer)
        if not tokens:
            raise DataError("there are no prompts")
        requests = [check_request(request, self.target, self.eos) for request in arguments.requests(tokens)]
        texts = arguments.texts(self.tokenizer, len(requests))
        ruled = any(isinstance(request.processor, Grammar) for request in requests)
        make_drafter = forcing(self.make_drafter, self.target) if ruled else self.make_drafter
        return BatchStream(self.target, make_drafter, requests, texts, self.eos, rows)

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: Logprobs | int | None = None,
        processor: Processor | None = None,
    ) -> AnswerStream:
        """One answer as pieces, as they come. Errors in the arguments are raised here, before the first piece."""
        batch = self.stream_batch(
            [prompt],
            sampling=sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            processor=processor,
        )
        return AnswerStream(batch)


def load(
    model: str | Path | PreTrainedModel,
    *,
    drafter: DrafterChoice = "kangaroo",
    adapter: str | Path | None = None,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    allow_other_target: bool = False,
    exact: bool = True,
    pack: bool | None = None,
    compile: bool = False,
    threads: int | Literal["auto"] | None = None,
    graphs: bool | Literal["auto"] = False,
    **settings: Any,
) -> Decoder:
    """A Decoder for a model: "demo" (SmolLM2-135M-Instruct), a folder, a hub name, or a model already loaded.

    `drafter` is a name in DRAFTERS, a config such as ChainConfig(...), or a function that makes a Drafter for a Target.
    `settings` say where drafters' files lie (heads, eagle3, draft_model, datastore: the demo brings some), and how this
    one drafts (max_draft, threshold, exit_layer, ...). `allow_other_target` lets an adapter or heads draft for a
    relative of the model they were trained for: the text stays the target's own, fewer drafts are accepted.

    The model goes on the GPU if there is one. `dtype` defaults to the checkpoint's there and to what a CPU runs fastest
    otherwise. For device maps or quantisation, load the model with transformers and pass it in. `exact=False` gives up
    the same bits with drafts and without, for what that costs (docs/speed.md). `pack` has linears keep their weights in
    the order in which a CPU reads them, and in no other; by default, where the model is loaded here. `compile` has them
    and whole layers computed by kernels that are compiled for this processor, once, which needs a C++ compiler.
    `threads` sets how many torch computes with, in this whole process: "auto" tries, None leaves that alone. `graphs`
    has passes over few tokens run as CUDA graphs: "auto" where that can be done with the same bits, True there or not
    at all.

    Raises ConfigError, ModelError, AdapterError or DataError.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    choose_drafter(drafter, given)  # a mistake should not wait for the model to load
    files = _take_files(given, adapter, bundled=demo.FILES if str(model) == demo.NAME else {})
    options = {"revision": revision, "attn_implementation": attn_implementation}
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, PreTrainedModel):
        _refuse({"device": device, "dtype": dtype, **options})
        loaded = model
    else:
        loaded = load_model(model, dtype, device, trust_remote_code=trust_remote_code, **options)
    set_threads(threads, loaded, compile)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        name = tokenizer or loaded.config._name_or_path
        tokenizer = load_tokenizer(name, revision if tokenizer is None else None, trust_remote_code=trust_remote_code)
    pack = loaded is not model if pack is None else pack
    target = Target(loaded, exact=exact, pack=pack, compile=compile, graphs=graphs)
    own = Tokenizer(tokenizer)
    plain = Decoder(target, NoDrafter, own, end_tokens(loaded), files, allow_other_target=allow_other_target)
    return plain.with_drafter(drafter, **given)


def _take_files(
    given: dict[str, Any], adapter: str | Path | None, bundled: Mapping[str, str | Path]
) -> dict[str, str | Path]:
    """The files that settings name, taken out of these, and those that come with the model where none are named."""
    named: dict[str, str | Path] = {name: given.pop(name) for name in FILES if name in given}
    return {**bundled, **named, **({} if adapter is None else {"adapter": adapter})}


def _refuse(chosen: Mapping[str, Any]) -> None:
    """Raise ConfigError for what cannot be chosen of a model that is loaded already."""
    wrong = next((name for name, value in chosen.items() if value is not None), None)
    if wrong is not None:
        raise ConfigError(f"the model is loaded already: {wrong} is for models that are loaded here; leave it out")
