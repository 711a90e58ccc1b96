"""Chain alone, or with copies from the context? Both simulated on what SmolLM2 has answered greedily.

    python recipes/choose_drafter.py --data held_out.jsonl [--adapter runs/smollm2-adapter/best]

One pass of the adapter over each answer tells which of its tokens it would draft, and how surely; rounds follow by
walking, copies by the drafter's own index and odds. A round costs a plain step, for every token of the adapter the
share of the weights that drafting reads, and NODE for verifying each token, drafted or copied. What the adapter drafts
after a wrong token is not known; the text's own confidences stand in. Prefill is left out.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kangaroo.demo import find_adapter
from kangaroo.documents import Document
from kangaroo.drafters.copying.ngrams import NgramIndex
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.lookup import KangarooLookupConfig, Odds
from kangaroo.drafters.kangaroo.self_draft import SelfDraft
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import Packed
from kangaroo.training.corpus import tokenize
from kangaroo.training.evaluation import Judgement, chain_rounds
from kangaroo.training.recipe import AdapterRecipe, read_recipe
from kangaroo.training.run import load_target

NODE, ROOM = 0.02, 128
THRESHOLDS, LENGTHS = (0.1, 0.2, 0.3, 0.4, 0.6), (4, 6, 8)
RECIPE = Path("recipes/smollm2-adapter.toml")


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens of a prompt and of its answer, and what the adapter makes of each of these."""

    prompt: list[int]
    tokens: list[int]
    judged: Sequence[Judgement]


def main() -> None:
    """Print a line for every way to draft, the most promising last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapter", default="demo")
    options = parser.parse_args()
    recipe = read_recipe(RECIPE, {"states": None})
    assert isinstance(recipe, AdapterRecipe)
    target, tokenizer = load_target(recipe)
    adapter = Adapter.load(find_adapter(options.adapter), target)
    objective = AdapterObjective(target, adapter, SimpleNamespace(tokens=0), recipe)  # type: ignore[arg-type]
    share = SelfDraft(target, adapter, adapter.config.exit_layer).weight_share
    answers = judge(options.data, tokenizer, objective)
    ways = [(*way, copies) for way in itertools.product(LENGTHS, THRESHOLDS) for copies in (False, True)]
    lines = [simulate(answers, KangarooLookupConfig(max_draft=m, threshold=t), share, copies) for m, t, copies in ways]
    nothing = SimpleNamespace(max_draft=0, threshold=0.0, longest=5, max_copy=10, node_cost=NODE)
    lines.append(simulate(answers, nothing, share, copies=True))  # type: ignore[arg-type]
    print(json.dumps({"adapter": options.adapter, "answers": len(answers), "share": round(share, 3)}))
    for line in sorted(lines, key=lambda line: line["promised"]):
        print(json.dumps(line))


def judge(path: Path, tokenizer: Any, objective: AdapterObjective) -> list[Answer]:
    """The greedy answers of a file, cut to ROOM tokens."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    documents = [Document(r["source"], messages=r["messages"], where=str(path)) for r in rows if not r["temperature"]]
    corpus, answers = tokenize(documents, tokenizer, assistant_only=True), []
    for index in range(len(corpus)):
        tokens, marks = (part.tolist() for part in corpus.document(index))
        first = marks.index(True)
        end = min(first + sum(marks), first + ROOM)
        with torch.no_grad(), objective.precision():
            judged = objective.judge(Packed(corpus).lay_out([[index]], end))
        answers.append(Answer(tokens[:first], tokens[first:end], judged))
    return answers


def simulate(answers: Sequence[Answer], config: KangarooLookupConfig, share: float, copies: bool) -> dict[str, Any]:
    """Tokens a round and per cost, of all answers together."""
    rounds, emitted, cost, copied = 0, 0, 0.0, 0
    for answer in answers:
        for count, drafted, match in walk(answer, config, share, copies):
            rounds, emitted = rounds + 1, emitted + count
            copied += bool(match)
            cost += 1 + drafted * (NODE + (0 if match else share))
    way = f"chain of {config.max_draft}, threshold {config.threshold}" + (", with copies" if copies else "")
    figures = {"cr": emitted / rounds, "promised": emitted / cost, "rounds_copied": copied / rounds}
    return {"way": way} | {name: round(value, 3) for name, value in figures.items()}


def walk(answer: Answer, config: KangarooLookupConfig, share: float, copies: bool) -> list[tuple[int, int, int]]:
    """(tokens emitted, tokens drafted, length of the match that was copied after or 0) of each round."""
    text, odds = NgramIndex(1, config.longest, "latest"), Odds(config, share)
    text.extend(answer.prompt[:-1])
    tokens, pending, at, rounds = answer.tokens, answer.prompt[-1], 0, []
    right, confident = [j[0] > 0 for j in answer.judged], [j[1] >= config.threshold for j in answer.judged]
    while at < len(tokens):
        room = ROOM - at - 1
        match, copy = text.continuation(pending, config.max_copy, loop=True) if copies else (0, [])
        if match and odds.prefers_copy(match, len(copy)):
            drafted = min(len(copy), room)
            hits = [a == b for a, b in zip(copy[:drafted], tokens[at:], strict=False)]
            count = min((hits.index(False) if False in hits else len(hits)) + 1, len(tokens) - at)
        else:
            match, longest = 0, min(config.max_draft, room)
            count = chain_rounds(right[at:], confident[at:], max_draft=longest, room=room + 1)[0]
            ahead = confident[at : at + longest]
            drafted = ahead.index(False) + 1 if False in ahead else len(ahead)
        odds.learn(match, drafted, count)
        text.extend([pending, *tokens[at : at + count - 1]])
        pending, at = tokens[at + count - 1], at + count
        rounds.append((count, drafted, match))
    return rounds


if __name__ == "__main__":
    main()
