"""Judge a trained adapter on text it has never seen, choose how it drafts, and save it in bfloat16.

    python recipes/publish_adapter.py RECIPE --adapter RUN/best --data held_out.jsonl --output FOLDER

The target answers the held-out prompts greedily; on its answers drafting is simulated for a grid of thresholds and
lengths. What promises most tokens per cost is written into the adapter's config: a round costs a plain step, and for
every drafted token the share of the weights that drafting reads, and NODE for verifying it.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.drafters.kangaroo.calibration import calibrate
from kangaroo.drafters.kangaroo.self_draft import SelfDraft
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.corpus import Given, choose_documents
from kangaroo.training.evaluation import chain_rounds
from kangaroo.training.floors import measure_floors
from kangaroo.training.recipe import AdapterRecipe, read_recipe
from kangaroo.training.run import load_target
from kangaroo.training.target_text import TargetText

NODE = 0.02
THRESHOLDS, LENGTHS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7), range(2, 9)


def main() -> None:
    """Judge, choose, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    for name in ("adapter", "data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    overrides = {
        "output": str(options.output.with_name(f"{options.output.name}-judged")),
        "data": {"held_out": options.prompts, "limit": 1},
        "evaluation": {"prompts": options.prompts, "max_tokens": options.max_tokens, "batch": 32},
    }
    recipe = read_recipe(options.recipe, overrides)
    assert isinstance(recipe, AdapterRecipe)
    target, tokenizer = load_target(recipe)
    _, documents = choose_documents(Given([options.data]).files(), recipe.data, recipe.seed)
    held_out = TargetText(target, tokenizer, recipe, lambda _: None).held_out(documents)
    adapter = Adapter.load(options.adapter, target)
    objective = AdapterObjective(target, adapter, held_out, recipe)
    figures = dict(objective.evaluate())
    # What was judged lies row by row, as the answers were packed.
    answers = [held_out.answers[i] for row in held_out.written.rows(held_out.written_length) for i in row]
    share = SelfDraft(target, adapter, adapter.config.exit_layer).weight_share
    speed, rate, threshold, longest = max(
        (
            *simulate(held_out.judged, answers, share, threshold, longest, options.max_tokens),
            threshold,
            longest,
        )
        for threshold, longest in itertools.product(THRESHOLDS, LENGTHS)
    )
    floors = measure_floors(objective, held_out.documents.corpus)
    figures |= {"share": share, "threshold": threshold, "max_draft": longest, "chosen_cr": rate, "chosen_speed": speed}
    figures |= {"early_exit_cr": floors.early_exit.rate, "early_exit_agreement": floors.early_exit.agreement}
    print(json.dumps(figures, indent=2))
    config = {**{name: getattr(adapter.config, name) for name in AdapterConfig.__dataclass_fields__}}
    adapter.config = AdapterConfig(**(config | {"threshold": threshold, "max_draft": longest}))
    provenance = json.loads((options.adapter / "config.json").read_text())["provenance"]
    adapter.to(torch.bfloat16).save(options.output, provenance | {"judged": figures})
    calibrate([c for _, c in held_out.judged], [bool(right) for right, _ in held_out.judged]).save(options.output)


def simulate(
    judged: Sequence[Sequence[float]],
    answers: Sequence[Sequence[int]],
    share: float,
    threshold: float,
    longest: int,
    room: int,
) -> tuple[float, float]:
    """(tokens per cost, tokens per round) of the chain over all answers."""
    at, emitted, rounds, cost = 0, 0, 0, 0.0
    for answer in answers:
        right, confidence = zip(*judged[at : at + len(answer)], strict=True)
        at += len(answer)
        confident = [value >= threshold for value in confidence]
        place = 0
        for count in chain_rounds(right, confident, max_draft=longest, room=room):
            # After a wrong token the confidences that would follow are unknown; those of the text stand in.
            ahead = confident[place : place + longest]
            cost += 1 + (share + NODE) * (ahead.index(False) + 1 if False in ahead else len(ahead))
            place += count
            emitted, rounds = emitted + count, rounds + 1
    return emitted / cost, emitted / rounds


if __name__ == "__main__":
    main()
