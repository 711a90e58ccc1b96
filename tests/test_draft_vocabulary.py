"""Adapters that draft over some of the tokens only, and adapters of several layers.

That they change no text is tested in test_lossless.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kangaroo.drafters.chain import top_probability
from kangaroo.drafters.draft_vocabulary import count_tokens
from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.self_draft import SelfDraft
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.model import Target
from kangaroo.sampling import Sampler, Sampling
from kangaroo.tree import sequence
from oracle import EVERYTHING, GREEDY, oracle
from runs import FEW, PROMPTS, generate, requests
from tiny import EXIT, VOCAB, build, make_adapter, target

END = 90


def ending() -> Target:
    """A target whose texts end with a token that is rarely counted."""
    model = build("llama")
    model.generation_config.eos_token_id = END
    return Target(model)


def test_logits_are_the_targets_head_at_the_chosen_tokens() -> None:
    for family in ("granite", "gemma2", "phi"):  # scaled, soft-capped, with a bias
        model = target(family)
        vocabulary = make_adapter(model, draft_vocabulary=FEW).vocabulary
        assert vocabulary is not None
        y = torch.randn(2, 3, model.width, dtype=torch.float64)
        full = model.logits(y)
        assert torch.allclose(vocabulary.logits(y), full[..., vocabulary.tokens], rtol=1e-12)
        spread = vocabulary.spread(vocabulary.logits(y))
        others = torch.ones(VOCAB, dtype=torch.bool)
        others[vocabulary.tokens] = False
        assert spread.shape == full.shape
        assert torch.allclose(spread[..., ~others], full[..., ~others], rtol=1e-12)
        assert (spread[..., others] == -torch.inf).all()


def test_the_most_frequent_tokens_are_chosen_and_the_one_that_ends_a_text() -> None:
    model = ending()
    adapter = Adapter(model, AdapterConfig(exit_layer=EXIT, draft_vocabulary=4))
    assert adapter.vocabulary is not None
    adapter.vocabulary.choose(count_tokens([7, 7, 7, 50, 50, 3, 12, 12, 12, 12, 5], VOCAB))
    assert adapter.vocabulary.tokens.tolist() == [7, 12, 50, END]
    y = torch.randn(1, model.width)
    before = adapter.vocabulary.logits(y.double())
    adapter.vocabulary.choose(count_tokens([1, 2, 3], VOCAB))
    assert adapter.vocabulary.tokens.tolist() == [1, 2, 3, END]
    assert not torch.equal(adapter.vocabulary.logits(y.double()), before), "the rows of the head follow the choice"


def test_no_token_outside_is_ever_drafted() -> None:
    model = target("llama")
    adapter = make_adapter(model, draft_vocabulary=FEW)
    assert adapter.vocabulary is not None
    kept = set(adapter.vocabulary.tokens.tolist())
    outside = 0
    for sampling in (GREEDY, EVERYTHING):
        for drafter in (
            Kangaroo(model, adapter, EXIT, ChainConfig(max_draft=3, threshold=0)),
            KangarooTree(model, adapter, EXIT, TreeConfig(top_k=3, max_draft=3, threshold=0)),
        ):
            for rule in ("match",) if isinstance(drafter, KangarooTree) else ("match", "reject"):
                run = generate(model, drafter, requests(PROMPTS, sampling, 16), rule=rule)
                accepted = {t for row in run.rounds for emitted in row for t in emitted[:-1]}
                assert accepted <= kept
                outside += sum(t not in kept for text in run.texts for t in text)
    assert outside > 0, "the target's own tokens should come from all of the vocabulary"


def test_the_short_way_of_a_greedy_chain_drafts_what_the_long_way_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = target("llama"), []
    for short in (True, False):
        drafter = Kangaroo(
            model, make_adapter(model, draft_vocabulary=FEW), EXIT, ChainConfig(max_draft=5, threshold=0.2)
        )
        if not short:
            monkeypatch.setattr(Sampler, "plain", False)
        runs.append(generate(model, drafter, requests(PROMPTS, GREEDY, 16)))
    assert (runs[0].rounds, runs[0].drafted) == (runs[1].rounds, runs[1].drafted)


@pytest.mark.parametrize(
    ("sampling", "plain"),
    [(Sampling(seed=3, index=1), True), (Sampling(temperature=0.5), False), (Sampling(presence_penalty=0.1), False),
     (Sampling(logit_bias={1: 1.0}), False)],
)  # fmt: skip
def test_rows_are_plain_if_only_the_best_token_counts(sampling: Sampling, plain: bool) -> None:
    assert Sampler([Sampling(), sampling], VOCAB, torch.device("cpu")).plain is plain


def test_confidence_is_that_of_the_distribution_that_is_drafted_from() -> None:
    vocabulary = make_adapter(target("llama"), draft_vocabulary=FEW).vocabulary
    assert vocabulary is not None
    logits = torch.randn(2, 1, FEW, dtype=torch.float64)
    assert torch.allclose(top_probability(logits), top_probability(vocabulary.spread(logits)))


@pytest.mark.parametrize("rule", ["match", "reject"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_bias_that_forbids_all_of_it(rule: str, temperature: float) -> None:
    model = target("llama")
    adapter = make_adapter(model, draft_vocabulary=FEW)
    assert adapter.vocabulary is not None
    forbidden = dict.fromkeys(adapter.vocabulary.tokens.tolist(), -torch.inf)
    sampling = Sampling(temperature=temperature, logit_bias=forbidden, seed=5)
    for drafter in (
        Kangaroo(model, adapter, EXIT, ChainConfig(max_draft=2, threshold=0)),
        KangarooTree(model, adapter, EXIT, TreeConfig(top_k=2, max_draft=2, threshold=0)),
    ):
        run = generate(model, drafter, requests(PROMPTS, sampling, 8), rule=rule)
        assert not any(run.accepted)
        assert not set(run.texts[0]) & forbidden.keys()
        if rule == "match":
            assert run.texts == [oracle(model.model, p, sampling, 8) for p in PROMPTS]


def test_a_draft_step_reads_so_much_less(tmp_path: Path) -> None:
    model = target("llama")
    shares = [SelfDraft(model, make_adapter(model, draft_vocabulary=n), EXIT).weight_share for n in (0, VOCAB, 24)]
    assert shares[0] == shares[1] > shares[2]
    head = sum(p.numel() for p in model.head.parameters())
    total = head + sum(p.numel() for p in model.layers.parameters())
    assert shares[0] - shares[2] == pytest.approx(head * (VOCAB - 24) / VOCAB / total, abs=1 / total)


# --- files


def saved(folder: Path, model: Target, **config: Any) -> Path:
    make_adapter(model, **config).save(folder, {})
    return folder


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = target("llama")
    made = make_adapter(model, layers=2, variant="full-layer", draft_vocabulary=FEW).float()
    made.save(tmp_path, {})
    again = Adapter.load(tmp_path, model)
    assert again.config == made.config
    assert again.vocabulary is not None
    assert again.vocabulary.tokens.dtype == torch.int64
    x, where = torch.randn(1, 5, model.width, dtype=torch.float64), sequence(1, 5)
    made.double()
    assert torch.allclose(again.logits(again(x, where)), made.logits(made(x, where)), rtol=1e-12)
    assert len(again.cache_layers) == 2


def test_files_from_before_there_were_layers_still_load(tmp_path: Path) -> None:
    model = target("llama")
    made = make_adapter(model, variant="full-layer").float()
    made.save(tmp_path, {})
    tensors = load_file(tmp_path / Adapter.file)
    save_file({name.removeprefix("layers.0."): t for name, t in tensors.items()}, tmp_path / Adapter.file)
    write_config(tmp_path, layers=None, draft_vocabulary=None)
    again = Adapter.load(tmp_path, model)
    assert again.config == made.config
    assert all(torch.equal(a, b) for a, b in zip(again.float().parameters(), made.parameters(), strict=True))


def write_config(folder: Path, **changes: Any) -> None:
    import hashlib

    table = json.loads((folder / "config.json").read_text()) | changes
    table["weights_sha256"] = hashlib.sha256((folder / Adapter.file).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if v is not None}))


@pytest.mark.parametrize(
    ("tokens", "named"),
    [([1, 3, 2], "rising"), ([1, 1, 2], "rising"), ([-1, 1, 2], "rising"), ([1, 2, VOCAB], "rising"),
     ([1, 2, 3], f"lacks token {END}")],
)  # fmt: skip
def test_draft_vocabularies_that_cannot_be(tmp_path: Path, tokens: list[int], named: str) -> None:
    model = ending()
    saved(tmp_path, model, draft_vocabulary=3)
    Adapter.load(tmp_path, model)
    tensors = load_file(tmp_path / Adapter.file)
    save_file(tensors | {"vocabulary.tokens": torch.tensor(tokens)}, tmp_path / Adapter.file)
    write_config(tmp_path)
    with pytest.raises(AdapterError, match=named):
        Adapter.load(tmp_path, model)


def test_sizes_that_cannot_be() -> None:
    model = ending()
    for change, named in (
        ({"draft_vocabulary": VOCAB + 1}, f"at most the target's {VOCAB}, got {VOCAB + 1}"),
        ({"draft_vocabulary": -1}, "got -1"),
        ({"draft_vocabulary": 9, "variant": "own-head"}, "drop draft_vocabulary"),
        ({"layers": 0}, "1 to 64 layers, got 0"),
    ):
        with pytest.raises(ConfigError, match=named):
            Adapter(model, AdapterConfig(exit_layer=EXIT, **change))
    with pytest.raises(ConfigError, match=r"lower adapter\.layers"):
        Adapter(model, AdapterConfig(exit_layer=EXIT, layers=4)).initialise(0, from_target=True)


def test_layers_start_as_the_targets_own_from_the_exit_on() -> None:
    model = target("llama")
    adapter = Adapter(model, AdapterConfig(exit_layer=1, layers=2, variant="full-layer"))
    adapter.initialise(0, from_target=True)
    x, where = torch.randn(1, 6, model.width, dtype=torch.float64), sequence(1, 6)
    wanted, _ = model.run(x, where, None, start=1, stop=3)
    assert torch.allclose(adapter.double()(x, where), model.norm(wanted), rtol=1e-5)
