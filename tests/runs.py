"""Running the loop in tests: drafters by name, and what a run did row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kangaroo.decode import decode, start
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.draft_model import DraftModel, DraftModelConfig
from kangaroo.drafters.kangaroo import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo_lookup import KangarooLookup, KangarooLookupConfig
from kangaroo.drafters.kangaroo_tree import KangarooTree, TreeConfig
from kangaroo.drafters.llma import LLMA, LLMAConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.drafters.prompt_lookup import LookupConfig, PromptLookup
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request, State
from tiny import EXIT, make_adapter, make_draft_model

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2], [1, 1, 2, 3, 5, 8, 13, 21, 34, 5, 8, 13, 21])

DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "none": lambda target: NoDrafter(),
    "kangaroo-fixed": lambda t: Kangaroo(t, make_adapter(t), EXIT, ChainConfig(max_draft=3, threshold=0)),
    "kangaroo": lambda t: Kangaroo(t, make_adapter(t), EXIT, ChainConfig(max_draft=5, threshold=0.35)),
    "kangaroo-tree": lambda t: KangarooTree(t, make_adapter(t), EXIT, TreeConfig(top_k=3, max_draft=3, threshold=0.05)),
    "early-exit": lambda t: Kangaroo(t, None, EXIT, ChainConfig(max_draft=4, threshold=0.2)),
    "early-exit-tree": lambda t: KangarooTree(t, None, EXIT, TreeConfig(top_k=2, max_draft=4, threshold=0.02)),
    "kangaroo+lookup": lambda t: KangarooLookup(
        t, make_adapter(t), EXIT, KangarooLookupConfig(max_draft=4, threshold=0.35, max_copy=5)
    ),
    "draft-model": lambda t: DraftModel(
        make_draft_model(t), t.vocab_size, DraftModelConfig(first_draft=2, max_draft=5, threshold=0.1)
    ),
    "prompt-lookup": lambda t: PromptLookup(LookupConfig(max_draft=4)),
    "llma": lambda t: LLMA(LLMAConfig(max_draft=6), None),
}

COPYING = {"prompt-lookup", "llma"}
"""Those that draft only where text repeats itself, which random models seldom do of their own accord."""


@dataclass
class Run:
    """What the loop emitted, and in which rounds."""

    texts: list[list[int]]
    rounds: list[list[tuple[int, ...]]] = field(default_factory=list)
    """Per row, the tokens each of its rounds emitted."""
    drafted: list[list[int]] = field(default_factory=list)
    """Per row, how many tokens each of its rounds drafted."""

    @property
    def accepted(self) -> list[int]:
        """Accepted drafts of every round of every row."""
        return [len(emitted) - 1 for row in self.rounds for emitted in row]


def drive(target: Target, drafter: Drafter, state: State, run: Run | None = None) -> Run:
    """Decode to the end."""
    run = run or new_run(state.batch)
    for done in decode(target, drafter, state):
        record(run, done.emitted, done.drafted)
    return run


def new_run(rows: int) -> Run:
    """Nothing emitted yet."""
    return Run([[] for _ in range(rows)], [[] for _ in range(rows)], [[] for _ in range(rows)])


def record(run: Run, emitted: Sequence[Sequence[int]], drafted: Sequence[int]) -> None:
    """Add a round; rows that emitted nothing took no part in it."""
    for row, tokens in enumerate(emitted):
        if tokens:
            run.texts[row].extend(tokens)
            run.rounds[row].append(tuple(tokens))
            run.drafted[row].append(drafted[row])


def requests(prompts: Sequence[Sequence[int]], sampling: Sampling, tokens: int) -> list[Request]:
    """The same sampling and length for every prompt."""
    return [Request(prompt, sampling, tokens) for prompt in prompts]


def generate(
    target: Target, drafter: Drafter, work: Sequence[Request], eos: Sequence[int] = (), rule: str = "match"
) -> Run:
    """Start and decode to the end."""
    return drive(target, drafter, start(target, drafter, work, eos=eos, rule=rule))
