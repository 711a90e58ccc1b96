"""`kangaroo demo`: a real chat model with Kangaroo and without."""

from typing import Annotated

import typer

from kangaroo.bench.check import Divergence, find_divergence
from kangaroo.bench.compare import Pair, compare
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.cli.options import Compile, Json, MaxTokens, ModelOptions, Threads
from kangaroo.cli.terminal import comparison_facts, print_json, progress, show_comparison, stream_answer
from kangaroo.decoder import Decoder
from kangaroo.sampling import Sampling


def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to answer.")] = 10,
    max_tokens: MaxTokens = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    threads: Threads = None,
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Answer held-out prompts with the demo model, with Kangaroo and without, and compare texts and speed."""
    decoder = ModelOptions(threads=threads, compile=compiled).open("kangaroo+lookup")
    chosen = interleave_kinds(read_prompts(split="held-out"))[:prompts]
    sampling = Sampling(temperature=temperature, seed=1)
    if not as_json:
        stream_answer(decoder.stream(chosen[0].messages, max_tokens=max_tokens, sampling=sampling))
    with progress("with Kangaroo and without, in turn", len(chosen), hidden=as_json) as advance:
        result = compare(
            decoder.plain(),
            decoder,
            [p.messages for p in chosen],
            max_tokens=max_tokens,
            sampling=sampling,
            report=lambda _: advance(1),
        )
    ties = sum(examine(decoder, pair, sampling).is_tie for pair in result.differing)
    facts = comparison_facts(result, decoder, sampling) | {"ties": ties}
    if as_json:
        print_json(facts)
    else:
        show_comparison(facts)
    wrong = len(result.differing) - (0 if decoder.target.exactness.level == "bitwise" else ties)
    if wrong:
        raise typer.Exit(1)


def examine(decoder: Decoder, pair: Pair, sampling: Sampling) -> Divergence:
    """How close the call was where a pair's answers part."""
    expected, got = pair.baseline.tokens, pair.method.tokens
    return find_divergence(decoder, decoder.tokenizer.encode(pair.prompt), expected, got, sampling)
