"""How much faster an engine is with an exported draft: the same prompts without and with it, in turns.

    PYTHONPATH=src:tests python tests/engines/speed.py llama.cpp --questions question.jsonl --dtype bfloat16

Questions are in any form that `kangaroo bench` reads; without a file, they are the project's own. One thread each side.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engines import ENGINES, Answer, Setup, write_models
from kangaroo import demo
from kangaroo.bench.formats import read_questions
from kangaroo.bench.questions import in_running_order
from kangaroo.bench.report.statistics import interval, resample_totals
from kangaroo.loading import load_tokenizer
from kangaroo.text import Tokenizer

LONGEST = 1024
"""Tokens of a prompt; longer ones are left out, as they would time the prefill."""


def main() -> None:
    wanted = _arguments().parse_args()
    prompts = _prompts(wanted.questions, wanted.prompts)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        target, draft = write_models(wanted.engine, Path(place), wanted.dtype)
        options = {"target": wanted.target or target, "tokens": wanted.tokens, "dtype": wanted.dtype}
        drafting = {"draft_tokens": wanted.draft_tokens, "confidence": wanted.confidence}
        run = ENGINES[wanted.engine]
        plain = stack.enter_context(run(Setup(draft=None, **options)))
        drafted = stack.enter_context(run(Setup(draft=wanted.draft or draft, **drafting, **options)))
        for ask in (plain, drafted):
            ask(prompts[0])  # the first answer pays for what is set up once
        pairs: list[tuple[Answer, Answer]] = []
        for number, prompt in enumerate(prompts):
            if number % 2:
                second = drafted(prompt)
                pairs.append((plain(prompt), second))
            else:
                pairs.append((plain(prompt), drafted(prompt)))
    print(json.dumps(_facts(pairs), indent=2))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=[*ENGINES])
    parser.add_argument("--questions", type=Path, default=demo.PROMPTS)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--confidence", type=float, default=0.0)
    parser.add_argument("--target", help="another file of the target, such as a quantised one")
    parser.add_argument("--draft", help="another file of the draft")
    return parser


def _prompts(questions: Path, count: int) -> list[list[int]]:
    tokenizer = Tokenizer(load_tokenizer("demo"))
    asked = in_running_order(read_questions(questions.read_bytes(), str(questions)))
    ids = (tokenizer.encode(question.conversation([])) for question in asked)
    return [prompt for prompt in ids if len(prompt) <= LONGEST][:count]


def _facts(pairs: Sequence[tuple[Answer, Answer]]) -> dict[str, object]:
    drafted, accepted = (sum(getattr(second, name) for _, second in pairs) for name in ("drafted", "accepted"))
    written = sum(len(second.tokens) for _, second in pairs)
    taken = np.array([[answer.seconds for answer in pair] for pair in pairs])
    seconds, totals = taken.sum(0), resample_totals(taken)
    return {
        "prompts": len(pairs),
        "texts equal": sum(first.tokens == second.tokens for first, second in pairs),
        "tokens/s without": round(written / seconds[0], 2),
        "tokens/s with": round(written / seconds[1], 2),
        "drafted": drafted,
        "share accepted": round(accepted / drafted, 3) if drafted else None,
        "emitted a round": round(written / (written - accepted), 2),
        "speed-up": round(seconds[0] / seconds[1], 3),
        "95 % of resamples": [round(value, 3) for value in interval(totals[:, 0] / totals[:, 1])],
    }


if __name__ == "__main__":
    main()
