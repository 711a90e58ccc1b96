"""Running the loop in tests: drafters by name, and what a run did row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from eagle3_reference import Reference, release_files
from kangaroo.decode import collect, decode, start
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.copying.datastore import Datastore
from kangaroo.drafters.copying.llma import LLMA, LLMAConfig
from kangaroo.drafters.copying.prompt_lookup import LookupConfig, PromptLookup
from kangaroo.drafters.copying.rest import Rest, RestConfig
from kangaroo.drafters.copying.suffixes import SuffixArray, join, load_sorter
from kangaroo.drafters.draft_model import DraftModel, DraftModelConfig
from kangaroo.drafters.eagle3.drafter import Eagle3, Eagle3ChainConfig, Eagle3Tree, Eagle3TreeConfig
from kangaroo.drafters.eagle3.head import Eagle3Head, place_next
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.lookup import KangarooLookup, KangarooLookupConfig
from kangaroo.drafters.kangaroo.stopping import CostAware, DraftCosts
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.drafters.medusa.drafter import Medusa, MedusaChainConfig, MedusaTree, MedusaTreeConfig
from kangaroo.drafters.medusa.heads import MedusaConfig, MedusaHeads
from kangaroo.drafters.none import NoDrafter
from kangaroo.exchange.checkpoint import Checkpoint, Table
from kangaroo.exchange.eagle3 import make_head
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request, State
from kangaroo.tree import sequence
from oracle import EVERYTHING, GREEDY, GREEDY_PENALISED
from tiny import EXIT, VOCAB, make_adapter, make_draft_model

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2], [1, 1, 2, 3, 5, 8, 13, 21, 34, 5, 8, 13, 21])

FEW = VOCAB * 2 // 3
"""Tokens of a draft vocabulary."""
CALIBRATION = Calibration((0.1, 0.5, 0.9), (0.2, 0.5, 0.9), after_right=0.6)
DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "none": lambda target: NoDrafter(),
    "kangaroo-fixed": lambda t: Kangaroo(t, make_adapter(t), EXIT, ChainConfig(max_draft=3, threshold=0)),
    "kangaroo": lambda t: Kangaroo(t, make_adapter(t), EXIT, ChainConfig(max_draft=5, threshold=0.35)),
    "kangaroo-auto": lambda t: Kangaroo(
        t,
        make_adapter(t),
        EXIT,
        ChainConfig(max_draft=6),
        CostAware(CALIBRATION, lambda _: DraftCosts(token=0.3), longest=6),
    ),
    "kangaroo-deep": lambda t: Kangaroo(
        t, make_adapter(t, layers=2, draft_vocabulary=FEW), EXIT, ChainConfig(max_draft=5, threshold=0.2)
    ),
    "kangaroo-tree-of-few": lambda t: KangarooTree(
        t, make_adapter(t, draft_vocabulary=FEW), EXIT, TreeConfig(top_k=3, max_draft=3, threshold=0.05)
    ),
    "kangaroo-tree": lambda t: KangarooTree(t, make_adapter(t), EXIT, TreeConfig(top_k=3, max_draft=3, threshold=0.05)),
    "early-exit": lambda t: Kangaroo(t, None, EXIT, ChainConfig(max_draft=4, threshold=0.2)),
    "early-exit-tree": lambda t: KangarooTree(t, None, EXIT, TreeConfig(top_k=2, max_draft=4, threshold=0.02)),
    "kangaroo+lookup": lambda t: KangarooLookup(
        t, make_adapter(t), EXIT, KangarooLookupConfig(max_draft=4, threshold=0.35, max_copy=5)
    ),
    "kangaroo+lookup-of-few": lambda t: KangarooLookup(
        t, make_adapter(t, layers=2, draft_vocabulary=FEW), EXIT, KangarooLookupConfig(max_draft=4, max_copy=5)
    ),
    "medusa": lambda t: Medusa(t, make_heads(t), MedusaChainConfig()),
    "medusa-tree": lambda t: MedusaTree(t, make_heads(t), MedusaTreeConfig(top_k=3, nodes=9)),
    "eagle3": lambda t: Eagle3(make_eagle3(t), Eagle3ChainConfig(max_draft=4, threshold=0.15)),
    "eagle3-tree": lambda t: Eagle3Tree(make_eagle3(t), Eagle3TreeConfig(top_k=3, max_draft=3, nodes=10)),
    "draft-model": lambda t: DraftModel(
        make_draft_model(t), t.vocab_size, DraftModelConfig(first_draft=2, max_draft=5, threshold=0.1)
    ),
    "prompt-lookup": lambda t: PromptLookup(LookupConfig(max_draft=4)),
    "llma": lambda t: LLMA(LLMAConfig(max_draft=6), None),
    "rest": lambda t: Rest(make_datastore(t), RestConfig(nodes=12, continuation=5)),
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


def generate_ids(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int,
    eos: Sequence[int] = (),
) -> list[list[int]]:
    """The tokens that each prompt is continued with."""
    state = start(target, drafter, requests(prompts, sampling, max_tokens), eos=eos)
    return collect(decode(target, drafter, state), len(prompts))


@cache
def make_datastore(target: Target) -> Datastore:
    """What the target says after the prompts, every sixth token wrong, and noise that seldom says what it does."""
    noise = np.random.default_rng(0).integers(target.vocab_size, size=(30, 100)).tolist()
    runs = [generate(target, NoDrafter(), requests(PROMPTS, s, 40)) for s in (GREEDY, GREEDY_PENALISED, EVERYTHING)]
    said = [[*prompt, *text] for run in runs for prompt, text in zip(PROMPTS, run.texts, strict=True)]
    wrong = [[(token + (place % 6 == 5)) % target.vocab_size for place, token in enumerate(text)] for text in said]
    return Datastore(index([*wrong, *noise], target.vocab_size), target.vocab_size)


def index(documents: Sequence[Sequence[int]], vocab_size: int) -> SuffixArray:
    """A suffix array in memory."""
    tokens = join(documents, vocab_size)
    return SuffixArray(tokens, load_sorter()(tokens), vocab_size)


@cache
@torch.inference_mode()
def make_heads(target: Target, heads: int = 3) -> MedusaHeads:
    """Heads that have seen the texts of PROMPTS, as the best linear maps to their tokens, and are still often wrong."""
    medusa = MedusaHeads(target, MedusaConfig(heads=heads)).to(target.dtype).eval().requires_grad_(False)
    medusa.initialise(0, from_target=True)
    states, tokens = list[torch.Tensor](), list[torch.Tensor]()
    for sampling in (GREEDY, GREEDY_PENALISED, EVERYTHING):
        answers = generate_ids(target, NoDrafter(), PROMPTS, sampling, max_tokens=20)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            text = torch.tensor([*prompt, *answer])
            x, _ = target.run(target.embed(text[None]), sequence(1, len(text)), None)
            states.append(target.norm(x)[0])
            tokens.append(functional.one_hot(text, VOCAB).to(x.dtype))
    for head, own in enumerate(medusa.maps):
        known = torch.cat([x[: -2 - head] for x in states])
        wanted = torch.cat([one_hot[2 + head :] for one_hot in tokens])
        own.weight.copy_(8 * torch.linalg.lstsq(known, wanted).solution.T)
    return medusa


@cache
def make_eagle3(target: Target) -> Eagle3Head:
    """A random head that drafts FEW tokens, and has learnt the texts of PROMPTS."""
    config, tensors = release_files(target.model, FEW)
    found = Checkpoint(Table(config, Path("config.json")), tensors, Path("pytorch_model.bin"), "")
    head = make_head(found, target).to(target.dtype)
    texts = list[list[int]]()
    for sampling in (GREEDY, GREEDY_PENALISED, EVERYTHING):
        answers = generate_ids(target, NoDrafter(), PROMPTS, sampling, max_tokens=20)
        texts += [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    teach(head, texts)
    return head


@torch.inference_mode()
def teach(head: Eagle3Head, texts: Sequence[Sequence[int]]) -> None:
    """Make its map to the vocabulary the best linear one to what follows in the texts; it is still often wrong."""
    target, vocabulary = head.target, head.vocabulary
    assert vocabulary is not None
    states, wanted = list[torch.Tensor](), list[torch.Tensor]()
    for text in texts:
        tokens, where = torch.tensor([list(text)]), sequence(1, len(text) - 1)
        _, features = target.run(target.embed(tokens[:, :-1]), where, None, taps=head.config.taps)
        cache, x = target.new_cache(1, len(text), head.cache_layers), head.fuse(features)
        for ahead in (1, 2):  # from true features, and from the head's own output after them
            where = place_next(where, len(text))
            x = head(x, tokens[:, ahead:], where, cache)[:, :-1]
            states.append(head.norm(x)[0])
            wanted.append((tokens[0, 1 + ahead :, None] == vocabulary.tokens).to(x.dtype))
            where = where[0 : where.slots.shape[1] - 1]
    solved = torch.linalg.lstsq(torch.cat(states).double(), torch.cat(wanted).double(), driver="gelsd").solution
    head.lm_head.weight.copy_(24 * solved.T)


def eagle3_reference(target: Target) -> Reference:
    """The same head in the layout of the release."""
    config, tensors = release_files(target.model, FEW)
    return Reference(target.model, tensors | {"lm_head.weight": make_eagle3(target).lm_head.weight}, config)
