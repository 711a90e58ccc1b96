"""Measure what measuring costs: benchmark answers, whose drafting and checking are timed, against the same untimed.

    python recipes/little/measure_overhead.py --output results/little/overhead.json

Pairs of the same answer, in alternating order, one thread. Run it on an otherwise idle machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kangaroo
from kangaroo.bench.compare import without_end
from kangaroo.bench.drafted import Drafted
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.decode import decode, start
from kangaroo.decoder import Decoder
from kangaroo.files import write_json
from kangaroo.machine import surroundings
from kangaroo.sampling import Sampling
from kangaroo.state import Request

PROMPTS, TOKENS, PAIRS = 6, 64, 12


def untimed(decoder: Decoder, prompt: list[int], sampling: Sampling) -> None:
    """What `Drafted` does, without clocks."""
    drafter = decoder.make_drafter()
    state = start(decoder.target, drafter, [Request(prompt, sampling, TOKENS)], eos=decoder.eos)
    for _ in decode(decoder.target, drafter, state):
        pass


def seconds(call: Callable[[], object]) -> float:
    """Wall time."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def overhead(decoder: Decoder, prompts: list[list[int]]) -> dict[str, Any]:
    """Median over pairs of what clocks add, as a share of the untimed seconds."""
    sampling, timed = without_end(Sampling(), decoder.eos), Drafted(decoder)
    shares = []
    for pair in range(PAIRS + 1):
        for prompt in prompts:
            calls = [partial(untimed, decoder, prompt, sampling), partial(timed.answer, [prompt], sampling, TOKENS)]
            order = (0, 1) if pair % 2 else (1, 0)
            found = {which: seconds(calls[which]) for which in order}
            if pair:  # the first is a warm-up
                shares.append(found[1] / found[0] - 1)
    low, middle, high = statistics.quantiles(shares, n=4)
    return {"pairs": len(shares), "median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def main() -> None:
    """Write the record down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = kangaroo.load("tests/little/target", drafter="none")
    asked = interleave_kinds(read_prompts(split="development"))[:PROMPTS]
    prompts = [plain.tokenizer.encode(prompt.messages) for prompt in asked]
    record = {
        drafter: overhead(plain.with_drafter(drafter), prompts) for drafter in ("none", "kangaroo", "prompt-lookup")
    }
    record |= {"surroundings": surroundings()}
    write_json(options.output, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
