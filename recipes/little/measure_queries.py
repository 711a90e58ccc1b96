"""Time drafters that copy where they find nothing: what does looking cost, in short contexts and in long ones?

    python recipes/little/measure_queries.py --output results/little/queries.json

Rounds: the little model at batch 1, plain decoding and each drafter in turn, on development prompts. The drafters look
as they always do, but what they find is thrown away, so that every round is a miss. Queries: an index of 1,000 and of
30,000 tokens, asked and extended as a round does. Run it on an otherwise idle machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kangaroo
from kangaroo.bench.compare import without_end
from kangaroo.bench.drafted import Drafted
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.decoder import Decoder
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.copying.ngrams import NgramIndex
from kangaroo.drafters.none import NoDrafter
from kangaroo.files import write_json
from kangaroo.machine import surroundings
from kangaroo.sampling import Sampling
from kangaroo.state import Committed, State
from kangaroo.tree import Draft

PROMPTS, TOKENS, REPEATS = 12, 64, 3


class Luckless:
    """A drafter that looks and never finds."""

    def __init__(self, drafter: Drafter):
        self._drafter, self._nothing = drafter, NoDrafter()
        self.taps, self.nodes, self.cache_layers = drafter.taps, drafter.nodes, drafter.cache_layers

    def observe(self, state: State, committed: Committed) -> None:
        """As the drafter does."""
        self._drafter.observe(state, committed)

    def draft(self, state: State) -> Draft:
        """Nothing, after all the work."""
        self._drafter.draft(state)
        return self._nothing.draft(state)


def rounds() -> dict[str, Any]:
    """Seconds of a round of plain decoding, and of each drafter's rounds, with and without what the drafter takes."""
    plain = kangaroo.load("tests/little/target", drafter="none")
    methods = {"none": Drafted(plain)}
    for name in ("prompt-lookup", "llma", "rest"):
        make = plain.with_drafter(name).make_drafter
        luckless = Decoder(plain.target, lambda make=make: Luckless(make()), plain.tokenizer, plain.eos)
        methods[name] = Drafted(luckless)
    prompts = [plain.tokenizer.encode(p.messages) for p in interleave_kinds(read_prompts(split="development"))]
    sampling, seconds = without_end(Sampling(), plain.eos), {name: [0.0, 0.0] for name in methods}
    for repeat in range(REPEATS + 1):
        for prompt in prompts[:PROMPTS]:
            for name, method in methods.items():
                answer = method.answer([prompt], sampling, TOKENS)[0]
                if repeat:  # the first pass warms up
                    seconds[name][0] += answer.draft + answer.verify + answer.rest
                    seconds[name][1] += answer.draft
    count, step = REPEATS * PROMPTS * TOKENS, seconds["none"][0]
    return {
        name: {
            "round_seconds": total / count,
            "over_plain": total / step,
            "drafter_seconds": looking / count,
            "over_plain_drafter_aside": (total - looking) / (step - seconds["none"][1]),
        }
        for name, (total, looking) in seconds.items()
    }


def queries() -> dict[str, float]:
    """Median microseconds to extend an index by one token and to ask it, by the size of its text."""
    found = {}
    for size in (1_000, 30_000):
        text = np.random.default_rng(0).integers(0, 500, size + 2_000).tolist()
        index, times = NgramIndex(1, 3, "latest"), list[float]()
        index.extend(text[:size])
        for token in text[size:]:
            began = time.perf_counter()
            index.continuation(token, 10)
            index.extend([token])
            times.append(time.perf_counter() - began)
        found[str(size)] = 1e6 * statistics.median(times)
    return found


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = surroundings() | {"rounds": rounds(), "query_microseconds": queries()}
    write_json(options.output, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
