"""Which way of drafting suits the demo? Acceptance on development prompts, and the speed that it promises.

    python recipes/choose_drafter.py --data held_out.jsonl --prompts 40 --output runs/drafters.jsonl

Prompts are decoded greedily, together: what is accepted does not depend on the batch. A round costs a plain step, for
every token of the adapter the share of the weights that drafting reads, and NODE for verifying each token, drafted or
copied. Prefill is left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kangaroo.decoder import Decoder, load
from kangaroo.documents import read_documents
from kangaroo.drafters.kangaroo.chain import Kangaroo
from kangaroo.drafters.kangaroo.lookup import KangarooLookup, Odds

NODE = 0.02
THRESHOLDS, LENGTHS = (0.2, 0.4, 0.6), (6, 8)
Method = tuple[str, dict[str, Any]]


def main() -> None:
    """Decode by every method, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapter", default="demo")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    plain = load("demo", drafter="none", adapter=options.adapter, exact=False)
    rows = [d.messages for d in read_documents(options.data) if d.messages and len(d.messages) == 2]
    prompts = sorted((plain.tokenizer.encode(row[:1]) for row in rows[: options.prompts]), key=len)
    wanted = [answer.tokens for answer in plain.generate(prompts, max_tokens=options.max_tokens)]
    with options.output.open("a", encoding="utf-8") as file:
        for drafter, settings in methods(plain):
            figures = measure(plain.with_drafter(drafter, **settings), prompts, options.max_tokens, wanted)
            line = json.dumps({"adapter": options.adapter, "drafter": drafter, **settings, **figures})
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)


def methods(plain: Decoder) -> list[Method]:
    """Drafters and their settings; the costs of "auto" are those of the promise."""
    self_draft = plain.with_drafter("kangaroo").make_drafter()
    assert isinstance(self_draft, Kangaroo)
    auto = {"stop": "auto", "draft_cost": self_draft.model.weight_share, "node_cost": NODE, "start_cost": 0.0}
    grid = [{"max_draft": longest, "threshold": eta} for longest in LENGTHS for eta in THRESHOLDS]
    return [
        ("kangaroo+lookup", {}),
        ("kangaroo", {}),
        ("kangaroo", auto),
        ("prompt-lookup", {}),
        *(("kangaroo+lookup", settings) for settings in grid),
        *(("kangaroo", settings) for settings in grid),
    ]


def measure(decoder: Decoder, prompts: list[list[int]], max_tokens: int, wanted: list[list[int]]) -> dict[str, float]:
    """Tokens a round, drafted and copied tokens a round, and the speed they promise beside plain decoding."""
    copied, learn = 0, Odds.learn

    def count(odds: Odds, match: int, drafted: int, emitted: int) -> None:
        nonlocal copied
        copied += drafted if match else 0
        learn(odds, match, drafted, emitted)

    Odds.learn = count  # type: ignore[method-assign]
    try:
        answers = decoder.generate(prompts, max_tokens=max_tokens)
    finally:
        Odds.learn = learn  # type: ignore[method-assign]
    made = decoder.make_drafter()
    share = made.model.weight_share if isinstance(made, Kangaroo | KangarooLookup) else 0.0
    rounds, emitted, drafted = (sum(getattr(a.stats, n) for a in answers) for n in ("rounds", "emitted", "drafted"))
    cost = rounds + drafted * NODE + (drafted - copied) * share
    same = sum(answer.tokens == tokens for answer, tokens in zip(answers, wanted, strict=True))
    return {
        "cr": round(emitted / rounds, 3),
        "drafted": round(drafted / rounds, 3),
        "copied": round(copied / rounds, 3),
        "promised": round(emitted / cost, 3),
        "tokens": emitted,
        "same": same,
    }


if __name__ == "__main__":
    main()
