"""EAGLE-3's drafters against the paper's definitions, computed in plain loops without a cache (eagle3_reference.py)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_reference import Reference, release_files
from kangaroo.bench.cost import describe, method_costs, trained_parameters
from kangaroo.decode import prefill, start, step
from kangaroo.decoder import Decoder
from kangaroo.drafters import DRAFTERS as TABLE
from kangaroo.drafters.eagle3.drafter import Eagle3, Eagle3ChainConfig, Eagle3Tree, Eagle3TreeConfig
from kangaroo.drafters.eagle3.head import Eagle3Config, Eagle3Head, default_taps, place_next
from kangaroo.drafters.medusa.heads import MedusaHeads
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.exchange.checkpoint import Checkpoint, Table
from kangaroo.exchange.eagle3 import make_head
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request, State
from kangaroo.tree import Draft, Stop, chain, sequence
from oracle import EVERYTHING, GREEDY, oracle
from runs import FEW, PROMPTS, eagle3_reference, generate, make_eagle3, requests
from tiny import LAYERS, VOCAB, WIDTH, build, target

HEAD_LAYER = LAYERS  # the cache layer behind the target's own


def text_of(state: State, row: int) -> list[int]:
    """What a row holds, its pending token included."""
    return state.tokens[row, : int(state.lengths[row]) + 1].tolist()


def head_of(model: Target, reference: Reference, **top: Any) -> Eagle3Head:
    config = dict(reference.config) | top
    found = Checkpoint(Table(config, Path("config.json")), dict(reference.tensors), Path("pytorch_model.bin"), "")
    return make_head(found, model, reference.taps).to(model.dtype)


# --- the head


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "biases": {"attention_bias": True},
    "wide heads": {"head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
    "another base": {"rope_theta": 500.0, "rms_norm_eps": 1e-3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3": {
        "rope_theta": 50.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 12,
        },
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_drafts_follow_from_the_papers_definitions(variant: str) -> None:
    model = target("llama")
    config, tensors = release_files(model.model, FEW, **VARIANTS[variant])
    check_one(model, Reference(model.model, tensors, config))


@torch.inference_mode()
def test_what_else_heads_may_have() -> None:
    model = target("llama")
    config, tensors = release_files(model.model, VOCAB)  # of all tokens, without maps
    check_one(model, Reference(model.model, tensors, config))
    config, tensors = release_files(model.model, FEW)
    check_one(model, Reference(model.model, tensors, config, norm_before_residual=True), norm_before_residual=True)
    check_one(model, Reference(model.model, tensors, config, taps=(1, 4, 0)))
    own = {"embed_tokens.weight": torch.randn(VOCAB, WIDTH).double()}
    check_one(model, Reference(model.model, tensors | own, config))


def check_one(model: Target, reference: Reference, **top: Any) -> None:
    """Logits of a chain's first four steps, after a prompt that leaves rows and positions to get wrong."""
    head = head_of(model, reference, **top)
    drafter = Eagle3(head, Eagle3ChainConfig(max_draft=4))
    prompt, seen = PROMPTS[2], list[torch.Tensor]()
    honest = head.logits
    head.logits = lambda states: seen.append(honest(states)) or honest(states)  # type: ignore[method-assign,func-returns-value]
    state = start(model, drafter, requests([prompt], GREEDY, 20))
    draft = drafter.draft(state)
    drafted = draft.tokens[0, 1:].tolist()
    assert len(drafted) == len(seen) == 4
    for place in range(4):
        got = seen[place] if head.vocabulary is None else head.vocabulary.spread(seen[place])
        want = reference.logits(prompt, drafted[:place])
        # Norms compute in single precision.
        assert torch.allclose(got[0, 0], want, rtol=1e-5, atol=1e-4)
        assert drafted[place] == int(want.argmax())


@torch.inference_mode()
def test_a_copy_of_the_targets_embedding_is_not_kept() -> None:
    model = target("llama")
    config, tensors = release_files(model.model, FEW)
    copy = model.model.get_input_embeddings().weight.detach()
    for own, kept in ((copy.half(), False), (copy.bfloat16(), False), (copy * 1.1, True)):
        head = head_of(model, Reference(model.model, tensors | {"embed_tokens.weight": own}, config))
        assert head.config.own_embedding is kept
        assert (head.embedding is not None) is kept


# --- round after round


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kind", ["chain", "tree"])
@torch.inference_mode()
def test_drafts_are_the_references_whatever_was_accepted_and_whoever_had_the_row(family: str, kind: str) -> None:
    """Keys and values of committed tokens are those from true features; drafts in every round are the reference's."""
    model = target(family)
    head, reference = make_eagle3(model), eagle3_reference(model)
    drafter: Eagle3 | Eagle3Tree = Eagle3(head, Eagle3ChainConfig(max_draft=3))
    if kind == "tree":
        drafter = Eagle3Tree(head, Eagle3TreeConfig(top_k=2, max_draft=3, nodes=7))
    work = [Request(p, GREEDY, n) for p, n in zip(PROMPTS, (4, 11, 7), strict=True)]
    state = start(model, drafter, work, capacity=30)
    newcomers: list[list[int]] = [[4], [9] * 12]
    checked, nothing, accepted = 0, 0, set[int]()
    while bool(state.active.any()):
        draft = drafter.draft(state)
        for row in state.active.nonzero()[:, 0].tolist():
            text, room = text_of(state, row), int(state.room[row]) - 1
            if len(text) == 1:
                nothing += 1
                assert draft.stops[row] is (Stop.NOTHING if room else Stop.ROOM)
                assert not draft.valid[row, 1:].any()
                continue
            keys = state.cache.read(HEAD_LAYER, len(text), None)[0][row, :, 1:]
            assert torch.allclose(keys, true_keys(model, head, text), rtol=1e-5, atol=1e-5)
            want = chain_of(reference, text, min(3, room)) if kind == "chain" else tree_of(reference, text, room)
            assert paths_of(draft, row) == want
            assert draft.stops[row] is (Stop.ROOM if room <= 3 else Stop.LENGTH)
            checked += 1
        accepted |= {len(tokens) - 1 for tokens in step(model, drafter, state).emitted}
        for row in (~state.active).nonzero()[:, 0].tolist():
            if newcomers:
                state.assign(row, Request(newcomers.pop(), GREEDY, 8))
                prefill(model, drafter, state, rows=torch.tensor([row]))
    assert nothing == 2
    assert checked > 10
    assert 0 in accepted
    assert max(accepted) > 0


def true_keys(model: Target, head: Eagle3Head, text: Sequence[int]) -> torch.Tensor:
    """[H, T - 1, dim] keys beside every token of a text but the first, run in one go."""
    tokens, where = torch.tensor([list(text)]), sequence(1, len(text) - 1)
    _, features = model.run(model.embed(tokens[:, :-1]), where, None, taps=head.config.taps)
    cache = model.new_cache(1, len(text), head.cache_layers)
    head(head.fuse(features), tokens[:, 1:], place_next(where, len(text)), cache)
    return cache.read(HEAD_LAYER, len(text), None)[0][0, :, 1:]


def paths_of(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """What a row's valid nodes but the root say from the root on, in their order."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, draft.tokens.shape[1]):
        paths.append((*paths[int(draft.parents[row, node])], int(draft.tokens[row, node])))
    return [path for node, path in enumerate(paths) if node and bool(draft.valid[row, node])]


def chain_of(reference: Reference, text: Sequence[int], length: int) -> list[tuple[int, ...]]:
    drafted: list[int] = []
    for _ in range(length):
        drafted.append(int(reference.logits(text, drafted).argmax()))
    return [tuple(drafted[: count + 1]) for count in range(length)]


def tree_of(
    reference: Reference, text: Sequence[int], room: int, top_k: int = 2, levels: int = 3, nodes: int = 7
) -> list[tuple[int, ...]]:
    """Expansion and reranking as EAGLE-2 has them (Li et al. 2024, section 4), from a table of all paths."""
    made: dict[tuple[int, ...], float] = {}
    level = {(): 1.0}
    for _ in range(min(levels, room)):
        children = {}
        for path, product in level.items():
            best = reference.logits(text, path).softmax(0).topk(top_k)
            children |= {(*path, int(t)): product * float(p) for p, t in zip(best.values, best.indices, strict=True)}
        made |= children
        level = dict(sorted(children.items(), key=lambda item: -item[1])[:top_k])
    return sorted(made, key=lambda path: -made[path])[: nodes - 1]


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@torch.inference_mode()
def test_by_reject_the_chain_says_what_it_was_drawn_from(sampling: Sampling) -> None:
    model = target("llama")
    drafter, reference = Eagle3(make_eagle3(model), Eagle3ChainConfig(max_draft=3)), eagle3_reference(model)
    state = start(model, drafter, requests(PROMPTS[::2], sampling, 20), rule="reject")
    draft = drafter.draft(state)
    assert draft.probs is not None
    drafted = draft.tokens[:, 1:].tolist()
    logits = [[reference.logits(text_of(state, row), drafted[row][:k]) for k in range(3)] for row in range(2)]
    prefix = state.prefix(draft.tokens[:, :3], chain(2, 3))
    want = state.sampler.probs(torch.stack([torch.stack(row) for row in logits]), prefix)
    assert torch.allclose(draft.probs[:, 1:], want, atol=1e-5)
    assert (draft.probs[:, 1:].gather(2, draft.tokens[:, 1:, None]) > 0).all()


@pytest.mark.parametrize("drafter", ["chain", "tree"])
def test_greedy_texts_by_reject_with_few_tokens_to_draft(drafter: str) -> None:
    """A bias that forbids all tokens that the head knows leaves the text the model's own."""
    model, head = target("llama"), make_eagle3(target("llama"))
    assert head.vocabulary is not None
    bias = {int(token): -math.inf for token in head.vocabulary.tokens}
    forbidding = Sampling(logit_bias=bias)
    made = {
        "chain": lambda: Eagle3(head, Eagle3ChainConfig()),
        "tree": lambda: Eagle3Tree(head, Eagle3TreeConfig(top_k=3, max_draft=2, nodes=6)),
    }[drafter]
    for rule in ("match", "reject"):
        run = generate(model, made(), requests(PROMPTS, forbidding, 6), rule=rule)
        assert run.texts == [oracle(model.model, p, forbidding, 6) for p in PROMPTS]


def test_a_chain_stops_after_a_token_it_was_unsure_of() -> None:
    model = target("llama")
    head, reference, threshold = make_eagle3(model), eagle3_reference(model), 0.15
    drafter = Eagle3(head, Eagle3ChainConfig(max_draft=2, threshold=threshold))
    stops = set()
    with torch.inference_mode():
        state = start(model, drafter, requests(PROMPTS[::2], GREEDY, 24))
        for _ in range(4):
            draft, unsure = drafter.draft(state), []
            for row in range(2):
                drafted = draft.tokens[row, 1:][draft.valid[row, 1:]].tolist()
                text = text_of(state, row)
                sure = [float(reference.logits(text, drafted[:k]).softmax(0).max()) for k in range(len(drafted))]
                assert all(value >= threshold for value in sure[:-1])
                unsure.append(sure[-1] < threshold)
            done = step(model, drafter, state)
            assert [stop is Stop.CONFIDENCE for stop in done.stops] == unsure
            stops.update(done.stops)
    assert stops >= {Stop.CONFIDENCE, Stop.LENGTH}


# --- files, settings, facts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_eagle3(target("llama")).save(tmp_path / "head", {"made_by": "tests"})
    return tmp_path / "head"


@pytest.mark.parametrize("name", ["eagle3", "eagle3-tree"])
def test_drafters_are_built_from_a_folder(folder: Path, name: str) -> None:
    model = target("llama")
    settings = {"nodes": 12, "top_k": 3, "max_draft": 3} if name == "eagle3-tree" else {"max_draft": 3}
    drafter = TABLE[name].build(model, None, {"eagle3": folder, **settings})()
    run = generate(model, drafter, requests(PROMPTS, EVERYTHING, 12))
    assert run.texts == [oracle(model.model, prompt, EVERYTHING, 12) for prompt in PROMPTS]
    assert sum(run.accepted) > 0


def test_a_head_comes_back_as_it_was(folder: Path) -> None:
    again, head = Eagle3Head.load(folder, target("llama")), make_eagle3(target("llama"))
    assert again.config == head.config
    wanted = head.state_dict()
    assert all(
        torch.allclose(value, wanted[name], rtol=1e-6)  # they pass through single precision
        for name, value in again.state_dict().items()
    )
    assert all(not parameter.requires_grad for parameter in again.parameters())


def test_a_head_of_another_target_is_refused_unless_it_is_a_relative(folder: Path) -> None:
    other = Target(build("llama", seed=5))
    with pytest.raises(AdapterError, match=r"EAGLE-3 head in .* belong to another target"):
        Eagle3Head.load(folder, other)
    assert Eagle3Head.load(folder, other, allow_other_target=True).config == make_eagle3(target("llama")).config
    with pytest.raises(AdapterError, match=r"eagle3\.safetensors says EAGLE-3 head"):
        MedusaHeads.load(folder, target("llama"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"low": 9}, "reads states after"),
        ({"key_value_heads": 3}, "cannot be"),
        ({"rope_type": "dynamic"}, "rope_type must be one of"),
        ({"intermediate_size": 41}, "does not fit its config"),
        ({"draft_vocabulary": VOCAB + 1}, f"drafts {VOCAB + 1} tokens"),
        ({"epsilon": "small"}, "'epsilon' should be of type float"),
        ({"norm_before_residual": 1}, "'norm_before_residual' should be of type bool"),
    ],
)
def test_a_config_that_was_tampered_with(folder: Path, change: dict[str, object], named: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((AdapterError, ConfigError), match=named) as caught:
        Eagle3Head.load(folder, target("llama"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("eagle3", {}, "needs eagle3: give the folder"),
        ("eagle3", {"max_draft": 0}, "max_draft must be at least 1"),
        ("eagle3", {"threshold": 1.5}, "threshold is a probability"),
        ("eagle3", {"top_k": 3}, "no setting 'top_k'"),
        ("eagle3-tree", {"top_k": 0}, "at least 1"),
        ("eagle3-tree", {"top_k": 22, "max_draft": 4}, "at most 63 nodes, got 22 x 3"),
        ("eagle3-tree", {"nodes": 65}, r"nodes must be in 8\.\.64"),
        ("eagle3-tree", {"nodes": 7}, r"nodes must be in 8\.\.64"),
    ],
)
def test_settings_that_cannot_be(folder: Path, name: str, settings: dict[str, object], message: str) -> None:
    given = settings | ({"eagle3": folder} if settings else {})
    with pytest.raises(ConfigError, match=message):
        TABLE[name].build(target("llama"), None, given)


def test_the_largest_tree_fits_its_slots() -> None:
    model = target("llama")
    config = Eagle3TreeConfig(top_k=21, max_draft=4, nodes=6)
    drafter = Eagle3Tree(make_eagle3(model), config)
    assert drafter.nodes == 64
    run = generate(model, drafter, requests(PROMPTS, GREEDY, 6))
    assert run.texts == [oracle(model.model, prompt, GREEDY, 6) for prompt in PROMPTS]


def test_the_rule_for_taps_is_the_releases() -> None:
    assert default_taps(32) == (2, 16, 29)
    assert default_taps(28) == (2, 14, 25)


def test_what_is_said_of_a_head(folder: Path) -> None:
    model = target("llama")
    decoder = Decoder(model, TABLE["eagle3"].build(model, None, {"eagle3": folder}), None, ())  # type: ignore[arg-type]
    head = make_eagle3(model)
    weights = sum(parameter.numel() for parameter in head.parameters())
    facts = describe(decoder)
    assert facts["head_parameters"] == trained_parameters(decoder) == weights
    assert facts["draft_vocabulary"] == FEW
    assert facts["features_after_layers"] == [2, 2, 2]
    costs = method_costs(decoder)
    step_weights = sum(p.numel() for part in (*model.layers, model.head) for p in part.parameters())
    assert costs is not None
    assert costs.draft_share == pytest.approx(weights / step_weights)


def test_sizes_that_cannot_be() -> None:
    common = {"low": 1, "middle": 2, "high": 3, "heads": 4, "key_value_heads": 2, "head_dim": 8, "epsilon": 1e-5}
    Eagle3Config(**common, intermediate_size=8)  # type: ignore[arg-type]
    for wrong in ({"intermediate_size": 0}, {"intermediate_size": 8, "rope_low": 4.0}):
        with pytest.raises(ConfigError):
            Eagle3Config(**common, **wrong)  # type: ignore[arg-type]
