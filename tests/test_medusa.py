"""Medusa heads, and what drafts with them."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from kangaroo.bench.report.projection.parameters import TargetShape, adapter_parameters, medusa_parameters
from kangaroo.decode import prefill, start, step
from kangaroo.drafters import DRAFTERS as TABLE
from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig, Variant
from kangaroo.drafters.medusa.drafter import Medusa, MedusaChainConfig, MedusaTree, MedusaTreeConfig, grow
from kangaroo.drafters.medusa.heads import MedusaConfig, MedusaHeads
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.model import FAMILIES, Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request, State
from kangaroo.tree import Stop, chain, sequence
from oracle import EVERYTHING, GREEDY, oracle
from runs import PROMPTS, generate, make_heads, requests
from tiny import EXIT, VOCAB, WIDTH, build, make_adapter, target

HEADS = 3


def new_heads(model: Target, heads: int = HEADS) -> MedusaHeads:
    medusa = MedusaHeads(model, MedusaConfig(heads=heads))
    medusa.initialise(0, from_target=True)
    return medusa.to(model.dtype).requires_grad_(False)


# --- heads


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_untrained_heads_say_what_the_targets_own_head_says(family: str) -> None:
    """Whatever the family does to its logits: a scale, a soft-cap, a bias."""
    model = target(family)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    got, want = new_heads(model)(x), model.logits(x)
    assert got.shape == (2, 5, HEADS, VOCAB)
    for head in range(HEADS):
        # Heads are made and trained in float32.
        assert torch.allclose(got[:, :, head], want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_head_is_a_residual_block_and_a_map() -> None:
    model = target("llama")
    heads, x = new_heads(model), torch.randn(4, WIDTH, dtype=torch.float64)
    for parameter in heads.parameters():
        parameter.normal_()
    for i in range(HEADS):
        z = x @ heads.blocks[i].weight.T + heads.blocks[i].bias
        want = (x + z * torch.sigmoid(z)) @ heads.maps[i].weight.T
        assert torch.allclose(heads.logits(i, x), want)


def test_random_maps_and_idle_blocks() -> None:
    heads = MedusaHeads(target("phi"), MedusaConfig())
    heads.initialise(5, from_target=False)
    assert heads.config.heads == 4
    assert not any(parameter.any() for parameter in heads.blocks.parameters())
    weights = torch.stack([own.weight.detach() for own in heads.maps])
    assert 0.018 < float(weights.std()) < 0.022
    assert not torch.equal(weights[0], weights[1])
    again = MedusaHeads(target("phi"), MedusaConfig())
    again.initialise(5, from_target=False)
    assert torch.equal(again.maps[3].weight, heads.maps[3].weight)


# --- on disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_heads(target("llama")).save(tmp_path / "heads", {"recipe": "none"})
    return tmp_path / "heads"


def test_heads_come_back_as_they_were(folder: Path) -> None:
    again = MedusaHeads.load(folder, target("llama"))
    assert again.config == MedusaConfig(heads=HEADS)
    assert all(not p.requires_grad and p.dtype == torch.float64 for p in again.parameters())
    wanted = new_heads(target("llama")).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(AdapterError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_is_not_heads_and_heads_are_not_an_adapter(folder: Path, tmp_path: Path) -> None:
    model = target("llama")
    make_adapter(model).save(tmp_path / "adapter", {})
    message = refusal(lambda: MedusaHeads.load(tmp_path / "adapter", model))
    assert "no Medusa heads in" in message
    assert "adapter.safetensors says adapter" in message
    message = refusal(lambda: Adapter.load(folder, model))
    assert "no adapter in" in message
    assert "heads.safetensors says Medusa heads" in message
    assert "no Medusa heads in" in refusal(lambda: MedusaHeads.load(tmp_path, model))


def test_heads_of_another_target(folder: Path) -> None:
    assert "Medusa heads in" in refusal(lambda: MedusaHeads.load(folder, target("mistral")))
    more = Target(build("llama", vocab_size=VOCAB + 3))
    assert f"vocab_size {VOCAB}, but the target has {VOCAB + 3}" in refusal(lambda: MedusaHeads.load(folder, more))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heads": "3"}, "'heads' should be of type int"),
        ({"heads": 2}, "does not fit its config"),
        ({"weights_sha256": "0" * 64}, "damaged"),
        ({"target_fingerprint": None}, "target_fingerprint"),
    ],
)
def test_a_config_that_was_tampered_with(folder: Path, change: dict[str, object], named: str) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | change))
    assert named in refusal(lambda: MedusaHeads.load(folder, target("llama")))


def test_damaged_weights(folder: Path) -> None:
    path = folder / "heads.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(lambda: MedusaHeads.load(folder, target("llama")))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("medusa", {}, "needs heads: give the folder"),
        ("medusa", {"max_draft": 4}, "3 heads cannot draft max_draft = 4"),
        ("medusa", {"max_draft": 0}, "max_draft must be at least 1"),
        ("medusa", {"top_k": 3}, "no setting 'top_k'"),
        ("medusa-tree", {"nodes": 4}, "a tree over 3 heads needs at least 5 nodes, got 4"),
        ("medusa-tree", {"nodes": 65}, r"nodes must be in 2\.\.64"),
        ("medusa-tree", {"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_settings_that_cannot_be(folder: Path, name: str, settings: dict[str, object], message: str) -> None:
    given = settings | ({"heads": folder} if settings else {})
    with pytest.raises(ConfigError, match=message):
        TABLE[name].build(target("llama"), None, given)


def test_no_heads_at_all() -> None:
    with pytest.raises(ConfigError, match="has 1 to 63 heads, got 0"):
        MedusaConfig(heads=0)


def test_drafters_are_built_from_a_folder(folder: Path) -> None:
    model = target("llama")
    for name in ("medusa", "medusa-tree"):
        assert TABLE[name].files == "heads"
        drafter = TABLE[name].build(model, None, {"heads": str(folder)})()
        assert drafter.nodes == (64 if "tree" in name else 1 + HEADS)
        got = generate(model, drafter, requests(PROMPTS, EVERYTHING, 8))
        assert got.texts == [oracle(model.model, prompt, EVERYTHING, 8) for prompt in PROMPTS]


# --- drafting


@torch.inference_mode()
def head_logits(model: Target, text: torch.Tensor) -> torch.Tensor:
    """[H, V]: what the heads make of the state of the text's last token."""
    x, _ = model.run(model.embed(text[None]), sequence(1, len(text)), None)
    return make_heads(model)(model.norm(x[0, -1]))


def committed(state: State, row: int) -> torch.Tensor:
    return state.tokens[row, : state.lengths[row]]


@torch.inference_mode()
def test_heads_read_the_last_committed_token_round_after_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row, whatever was accepted before, after prompts in chunks, and after rows have changed hands."""
    monkeypatch.setattr(sys.modules["kangaroo.decode"], "PREFILL_CHUNK", 4)
    model = target("llama")
    drafter = Medusa(model, make_heads(model), MedusaChainConfig())
    work = [Request(p, GREEDY, n) for p, n in zip(PROMPTS, (4, 30, 7), strict=True)]
    state = start(model, drafter, work, capacity=40)
    newcomers = [[4], [9] * 12, [8, 8, 9]]
    checked, nothing = 0, 0
    while bool(state.active.any()):
        draft = drafter.draft(state)
        for row in range(state.batch):
            drafted = int(draft.valid[row, 1:].sum())
            if not state.active[row] or state.room[row] == 1:
                assert drafted == 0
            elif not len(committed(state, row)):
                nothing += 1
                assert drafted == 0
                assert draft.stops[row] is Stop.NOTHING
            else:
                checked += 1
                assert drafted == min(HEADS, int(state.room[row]) - 1)
                assert draft.stops[row] is (Stop.ROOM if state.room[row] - 1 <= HEADS else Stop.LENGTH)
                want = head_logits(model, committed(state, row)).argmax(-1)
                assert draft.tokens[row, 1 : drafted + 1].tolist() == want[:drafted].tolist()
        step(model, drafter, state)
        for row in (~state.active).nonzero()[:, 0].tolist():
            if newcomers:
                state.assign(row, Request(newcomers.pop(), GREEDY, 6))
                prefill(model, drafter, state, rows=torch.tensor([row]))
    assert nothing == 2
    assert checked > 15


def test_a_short_chain_uses_the_first_heads_only() -> None:
    model = target("llama")
    drafter = Medusa(model, make_heads(model), MedusaChainConfig(max_draft=2))
    run = generate(model, drafter, requests(PROMPTS, GREEDY, 16))
    assert drafter.nodes == 3
    assert max(max(row) for row in run.drafted) == 2
    assert max(run.accepted) == 2


@torch.inference_mode()
def test_by_reject_the_chain_says_what_it_was_drawn_from() -> None:
    """Processed as the target's logits are, with the draft so far as part of the text."""
    model = target("llama")
    drafter = Medusa(model, make_heads(model), MedusaChainConfig())
    state = start(model, drafter, requests(PROMPTS[::2], EVERYTHING, 20), rule="reject")
    draft = drafter.draft(state)
    assert draft.probs is not None
    prefix = state.prefix(draft.tokens[:, :HEADS], chain(2, HEADS))
    logits = torch.stack([head_logits(model, committed(state, row)) for row in range(2)])
    assert torch.allclose(draft.probs[:, 1:], state.sampler.probs(logits, prefix), atol=1e-9)
    assert (draft.probs[:, 1:].gather(2, draft.tokens[:, 1:, None]) > 0).all()


@pytest.mark.parametrize("rule", ["match", "reject"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=3)])
@torch.inference_mode()
def test_a_tree_holds_the_best_combinations_of_the_heads_candidates(rule: str, sampling: Sampling) -> None:
    model, top_k, nodes = target("mistral"), 4, 20
    drafter = MedusaTree(model, make_heads(model), MedusaTreeConfig(top_k=top_k, nodes=nodes))
    state = start(model, drafter, requests(PROMPTS[::2], sampling, 20), rule=rule)
    draft = drafter.draft(state)
    assert draft.tokens.shape == (2, nodes)
    assert draft.probs is None
    for row in range(2):
        scores = head_logits(model, committed(state, row))[None].expand(2, -1, -1)
        if rule == "match":
            positions = state.lengths[:, None] + 1 + torch.arange(HEADS)
            scores = state.sampler.perturb(scores, positions)
        chances = scores[row].softmax(-1)
        products = {
            path: float(torch.stack([chances[i, token] for i, token in enumerate(path)]).prod())
            for depth in range(1, HEADS + 1)
            for path in itertools.product(*(chances[i].topk(top_k).indices.tolist() for i in range(depth)))
        }
        best = sorted(products, key=lambda path: -products[path])[: nodes - 1]
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, nodes):
            paths.append((*paths[int(draft.parents[row, node])], int(draft.tokens[row, node])))
        assert paths[1:] == best
        assert draft.valid[row].all()


@given(st.data())
def test_the_best_paths_are_those_of_all_paths_sorted(data: st.DataObject) -> None:
    """Few distinct probabilities, so that ties abound; zeros, as rooms and filters make them."""
    levels, width, most = (data.draw(st.integers(1, n)) for n in (3, 3, 12))
    row = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=width, max_size=width)
    rows = [data.draw(st.lists(row.map(lambda r: sorted(r, reverse=True)), min_size=levels, max_size=levels))]
    rows.append([[1.0] * width] * levels)
    grown = grow(torch.tensor(rows), most)
    for index, chances in enumerate(rows):
        every = {
            path: math.prod(chances[level][rank] for level, rank in enumerate(path))
            for depth in range(1, levels + 1)
            for path in itertools.product(range(width), repeat=depth)
        }
        want = sorted(every.values(), reverse=True)[:most]
        assert grown.products[index].tolist() == want
        paths: list[tuple[int, ...]] = [()]
        for node, (parent, place) in enumerate(
            zip(grown.parents[index].tolist(), grown.places[index].tolist(), strict=True)
        ):
            assert parent <= node, "a parent comes before its child"
            assert len(paths[parent]) == place // width, "a candidate of a level hangs one level below it"
            paths.append((*paths[parent], place % width))
        assert len(set(paths)) == len(paths)
        assert [every[path] for path in paths[1:]] == want


def test_a_row_without_a_committed_token_drafts_nothing_beside_rows_that_do() -> None:
    model = target("llama")
    for drafter in (
        Medusa(model, make_heads(model), MedusaChainConfig()),
        MedusaTree(model, make_heads(model), MedusaTreeConfig(top_k=2, nodes=9)),
    ):
        run = generate(model, drafter, requests(PROMPTS, GREEDY, 12))
        assert run.drafted[1][0] == 0 < run.drafted[1][1]
        assert run.drafted[0][0] > 0


@pytest.mark.parametrize("family", ["phi", "gemma2", "cohere", "stablelm", "deepseek_v3"])
def test_families_with_heads_of_their_own_kind(family: str) -> None:
    model = target(family)
    tree = MedusaTree(model, make_heads(model), MedusaTreeConfig(top_k=3, nodes=12))
    for drafter, sampling in ((Medusa(model, make_heads(model), MedusaChainConfig()), GREEDY), (tree, EVERYTHING)):
        run = generate(model, drafter, requests(PROMPTS, sampling, 10))
        assert run.texts == [oracle(model.model, prompt, sampling, 10) for prompt in PROMPTS]
        assert 0 < sum(run.accepted) < sum(map(sum, run.drafted))


# --- sizes


def test_parameters_of_the_papers_models() -> None:
    small = TargetShape.of(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32))
    large = TargetShape.of(LlamaConfig(hidden_size=5120, intermediate_size=13824, num_attention_heads=40))
    assert medusa_parameters(small) == 591_413_248  # "591M"
    assert medusa_parameters(small, 1) == 147_853_312
    assert adapter_parameters(small) == 67_117_056  # "67M"
    assert adapter_parameters(large) == 104_867_840
    assert adapter_parameters(small, "own-head") == 198_189_056  # "198M"
    assert adapter_parameters(small, "full-layer") == 202_387_456  # "202M"


@pytest.mark.parametrize("family", ["llama", "mistral", "granite"])
def test_parameters_are_those_of_the_real_thing(family: str) -> None:
    model = target(family)
    shape = TargetShape.of(model.config)
    assert shape.key_value_heads < shape.heads
    variants: tuple[Variant, ...] = ("kangaroo", "own-head", "full-layer", "mlp-only")
    for variant, layers in itertools.product(variants, (1, 3)):
        adapter = Adapter(model, AdapterConfig(exit_layer=EXIT, variant=variant, layers=layers))
        assert adapter_parameters(shape, variant, layers) == sum(p.numel() for p in adapter.parameters())
    assert medusa_parameters(shape, HEADS) == sum(p.numel() for p in new_heads(model).parameters())
