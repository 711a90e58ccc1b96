"""What experiments on a tiny chat model are made of: recipes of both kinds, and something to learn from."""

import json
from dataclasses import dataclass
from pathlib import Path

from little_runs import TOKENS

ADAPTER = """
kind = "adapter"
target = "{target}"
output = "elsewhere"

[adapter]
exit_layer = 1

[data]
held_out = 4

[schedule]
steps = 6
batch_sequences = 2
sequence_length = 128

[run]
checkpoint_every = 2
evaluate_every = 3

[evaluation]
prompts = 2
max_tokens = 8
threshold = 0.02
"""
MEDUSA = (
    ADAPTER.replace('"adapter"', '"medusa"')
    .replace("[adapter]\nexit_layer = 1", "[medusa]\nheads = 2")
    .replace("threshold = 0.02\n", "")
)
HEAD = """
model = "{target}"
questions = "{questions}"
output = "{output}"
max_tokens = {tokens}
dtype = "float64"
"""
TRAINED = """
[training]
recipe = "adapter.toml"
data = ["meals.jsonl"]

[[methods]]
name = "one"
drafter = "kangaroo"
threshold = 0.02
train = {}

[[methods]]
name = "same"
drafter = "kangaroo"
threshold = 0.0
max_draft = 2
train = {}

[[methods]]
name = "two"
drafter = "kangaroo"
threshold = 0.02
train = { set = { "adapter.exit_layer" = 2 } }

[[methods]]
name = "heads"
drafter = "medusa"
train = { recipe = "medusa.toml" }
"""
EXPERIMENT = """
[experiment]
title = "Little things"
axis = "what differs"
"""


@dataclass(frozen=True)
class Lab:
    """A folder with recipes, and where runs go."""

    recipe: Path
    output: Path
    head: str

    def write(self, *parts: str) -> Path:
        """The benchmark recipe: the head, and these parts after it."""
        self.recipe.write_text("".join((self.head, *parts)), encoding="utf-8")
        return self.recipe


def make_lab(folder: Path, target: Path, questions: Path) -> Lab:
    for name, text in (("adapter.toml", ADAPTER), ("medusa.toml", MEDUSA)):
        (folder / name).write_text(text.format(target=target), encoding="utf-8")
    turns = ["Where would you like to eat?", "In the café.", "And tonight?", "I need 3 tickets."]
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    rows = [{"messages": [{**m, "content": f"{m['content']} {number}"} for m in messages]} for number in range(16)]
    (folder / "meals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output = folder / "run"
    head = HEAD.format(target=target, questions=questions, output=output, tokens=TOKENS)
    return Lab(folder / "recipe.toml", output, head)
