"""What an adapter run learns from, and what it leaves behind."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lesson
import pytest
import torch
from lesson import Lesson, build
from safetensors.torch import load_file, save_file

from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.errors import AdapterError, CapacityError, ConfigError, ModelError
from kangaroo.loading import end_tokens
from kangaroo.training import adapter as objective_file
from kangaroo.training import loop
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import learnt_positions
from kangaroo.training.estimate import RunEstimate
from kangaroo.training.report import Update
from kangaroo.training.run import load_target, new_adapter
from kangaroo.tree import sequence
from little_model import ADAPTER, TARGET

MakeLesson = Callable[..., Lesson]


def gradients(objective: AdapterObjective) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in objective.parameters().items() if p.grad is not None}
    for parameter in objective.parameters().values():
        parameter.grad = None
    return taken


# Loss


def test_loss_is_that_of_each_document_alone(make_lesson: MakeLesson) -> None:
    """Packed, masked and chunked: the same sums as a plain loop over documents and positions."""
    objective, packed = build(make_lesson(), loss__acceptance=0.5)
    target, adapter = objective.target, objective.adapter
    rows = packed.rows(64)[:3]
    loss = objective.loss(packed.lay_out(rows, 64))
    cross_entropy = rejected = agreed = positions = 0.0
    for tokens, marks in (packed.corpus.document(i) for row in rows for i in row):
        ids = torch.from_numpy(tokens[:64].astype("int64"))[None]
        where = sequence(1, ids.shape[1])
        final, taps = target.run(target.embed(ids), where, None, taps=(2,))
        log_p = target.logits(target.norm(final))[0].log_softmax(-1)
        log_q = adapter.logits(adapter(taps[2], where))[0].detach().log_softmax(-1)
        for t in range(ids.shape[1] - 1):
            if marks[t + 1]:
                cross_entropy -= float((log_p[t].exp() * log_q[t]).sum())
                rejected += 1 - float(torch.minimum(log_p[t].exp(), log_q[t].exp()).sum())
                agreed += float(log_p[t].argmax() == log_q[t].argmax())
                positions += 1
    assert loss.tokens == positions > 20
    assert float(loss.total.detach()) == pytest.approx(cross_entropy + 0.5 * rejected, rel=1e-5)
    assert loss.extra["soft_cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert loss.extra["sum_min"] == pytest.approx(positions - rejected, rel=1e-4)
    assert loss.extra["agreement"] == agreed


def test_logits_in_pieces_give_the_same_gradients(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, packed = build(make_lesson())
    batch = packed.batch(0, 2, 64, seed=0)
    whole = objective.loss(batch)
    whole.total.backward()
    expected = gradients(objective)
    monkeypatch.setattr(objective_file, "AT_ONCE", 7 * objective.target.vocab_size)
    parts = objective.loss(batch)
    parts.total.backward()
    assert float(parts.total.detach()) == pytest.approx(float(whole.total.detach()), rel=1e-6)
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


def naive(objective: AdapterObjective, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and the sums as they are defined, through autograd, over a draft vocabulary."""
    vocabulary, mask = objective.adapter.vocabulary, learnt_positions(batch)
    assert vocabulary is not None
    draft, final = objective._states(batch, mask)
    with torch.no_grad():
        p = objective.target.logits(objective.target.norm(final.states)).softmax(-1)
    log_q = vocabulary.logits(draft).log_softmax(-1)
    kept = p[:, vocabulary.tokens]
    cross_entropy, overlap = -(kept * log_q).sum(), torch.minimum(kept, log_q.exp()).sum()
    agreed = (p.argmax(-1) == vocabulary.tokens[log_q.argmax(-1)]).sum()
    sums = {
        "soft_cross_entropy": cross_entropy,
        "sum_min": overlap,
        "agreement": agreed,
        "lost_mass": (p.sum() - kept.sum()),
    }
    return cross_entropy + 0.5 * (len(p) - overlap), {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("keep", [False, True], ids=["run", "kept"])
def test_loss_over_a_draft_vocabulary(make_lesson: MakeLesson, tmp_path: Path, keep: bool) -> None:
    """By what is learnt from, the gradient that of the definition, whether the target's states are at hand or not."""
    states = {"states": str(tmp_path / "states")} if keep else {}
    objective, packed = build(
        make_lesson(), adapter__draft_vocabulary=40, adapter__layers=2, loss__acceptance=0.5, **states
    )
    corpus, vocabulary = packed.corpus, objective.adapter.vocabulary
    assert vocabulary is not None
    counts = torch.bincount(
        torch.from_numpy(corpus.tokens[corpus.trained].astype("int64")), minlength=objective.target.vocab_size
    )
    ends = set(end_tokens(objective.target.model))
    least = min(int(counts[t]) for t in vocabulary.tokens.tolist() if t not in ends)
    assert ends <= set(vocabulary.tokens.tolist())
    assert sum(int(n) > least for n in counts) <= 40
    batch = packed.batch(0, 2, 64, seed=0)
    wanted, sums = naive(objective, batch)
    wanted.backward()
    expected = gradients(objective)
    assert len(expected) == 2 * 5 + 1  # norm and four matrices a layer, the last norm
    for _ in range(2):  # the second time states are read
        loss = objective.loss(batch)
        loss.total.backward()
        assert float(loss.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        for name, value in sums.items():
            assert loss.extra[name] == pytest.approx(value, rel=1e-4, abs=1e-3)
        assert 0 < loss.extra["lost_mass"] < loss.tokens
        for name, gradient in gradients(objective).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


def test_a_draft_vocabulary_is_drafted_over_after_training(make_lesson: MakeLesson, target_folder: Path) -> None:
    """A run that goes on from a trained adapter keeps its tokens, and its size."""
    shape = {"adapter__draft_vocabulary": 40, "adapter__layers": 2, "adapter__variant": "full-layer"}
    run = make_lesson()
    best = run.train(**shape)
    target, _ = load_target(run.settings(**shape))
    trained = Adapter.load(best, target)
    assert trained.vocabulary is not None
    more = make_lesson()
    again = Adapter.load(more.train(**shape, adapter__init=str(best), schedule__steps=1), target)
    assert again.vocabulary is not None
    assert torch.equal(again.vocabulary.tokens, trained.vocabulary.tokens)
    with pytest.raises(ConfigError, match=r"adapter\.draft_vocabulary is 30"):
        make_lesson().train(**(shape | {"adapter__draft_vocabulary": 30}), adapter__init=str(best))
    with pytest.raises(ConfigError, match="draft vocabulary"):
        make_lesson().train(adapter__draft_vocabulary=target.vocab_size + 1)


def test_accumulation_is_the_joint_batch(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-batches of one row and one of four give the same gradients, though their rows hold unequal text."""
    found = []
    for rows, accumulate in ((4, 1), (1, 4)):
        run = make_lesson()
        taken: dict[str, torch.Tensor] = {}
        recipe = run.settings(schedule__batch_sequences=rows, schedule__accumulate=accumulate)
        objective, packed = build(run)
        counts = [int(learnt_positions(packed.batch(i, 1, 64, recipe.seed)).sum()) for i in range(4)]
        assert len(set(counts)) > 1
        trainer = loop.Trainer(objective, packed, recipe, loop.Progress(0))
        monkeypatch.setattr(trainer.optimizer, "step", lambda o=objective, t=taken: t.update(gradients(o)))
        row = trainer.train_step()
        found.append((row["loss"], taken))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-6)


def test_target_is_frozen(make_lesson: MakeLesson) -> None:
    objective, packed = build(make_lesson())
    objective.loss(packed.batch(0, 2, 64, seed=0)).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.target.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters().values())


@pytest.mark.parametrize("variant", ["own-head", "full-layer", "mlp-only"])
def test_variants_train(make_lesson: MakeLesson, variant: str) -> None:
    run = make_lesson()
    best = run.train(adapter__variant=variant, schedule__steps=3)
    losses = [row["loss"] for row in run.rows() if "loss" in row]
    assert losses[2] < losses[0]
    assert Adapter.load(best, load_target(run.settings())[0]).config.variant == variant


def test_mixed_precision_and_half_targets(make_lesson: MakeLesson) -> None:
    exact, mixed, half = make_lesson(), make_lesson(), make_lesson()
    exact.train(schedule__steps=2)
    mixed.train(schedule__steps=2, run__mixed_precision="bf16")
    half.train(schedule__steps=2, run__dtype="bfloat16")
    losses = [run.rows()[0]["loss"] for run in (exact, mixed, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)
    assert len(set(losses)) == 3


# The target's own words


def test_regenerated_answers_are_the_targets(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    recipe = {"regenerate__prompts": 10, "regenerate__max_tokens": 8, "regenerate__batch": 3}
    objective, packed = build(run, **recipe)
    target, eos = objective.target, int(objective.target.model.config.eos_token_id)
    for index in range(10):
        tokens, marks = packed.corpus.document(index)
        first = int(marks.argmax())
        assert marks[first:].all()
        ids = torch.from_numpy(tokens.astype("int64"))[None]
        final, _ = target.run(target.embed(ids), sequence(1, len(tokens)), None)
        greedy = target.logits(target.norm(final))[0].argmax(-1).tolist()
        assert tokens[first:].tolist() == greedy[first - 1 : -1]
        assert len(tokens) - first == 8 or tokens[-1] == eos
    assert len(packed.corpus) == 34


def test_answers_do_not_depend_on_the_batch_and_are_kept(make_lesson: MakeLesson) -> None:
    texts = []
    for batch in (2, 7):
        run = make_lesson()
        build(
            run, regenerate__prompts=9, regenerate__temperature=1.0, regenerate__max_tokens=9, regenerate__batch=batch
        )
        texts.append((run.output / "regenerated.jsonl").read_text())
    assert texts[0] == texts[1]
    # Killed half-way: whole rows are kept, the torn one is made again.
    path = run.output / "regenerated.jsonl"
    path.write_text("\n".join(texts[0].split("\n")[:4]) + "\n[12, 5")
    build(run, regenerate__prompts=9, regenerate__temperature=1.0, regenerate__max_tokens=9)
    assert path.read_text() == texts[0]


# Where it starts


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_starts_from_exactly_the_weights_of_a_folder(make_lesson: MakeLesson, dtype: str) -> None:
    first, second = make_lesson(), make_lesson()
    taken = first.train(schedule__steps=3)
    # A rate too small to change a float32: what is kept is what it started from.
    still = {"schedule__steps": 2, "optimizer__learning_rate": 1e-30}
    kept = second.train(adapter__init=str(taken), run__dtype=dtype, **still)
    before, after = weights(taken), weights(kept)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    untrained = weights(make_lesson().train(**still))
    assert not torch.equal(before["layers.0.attention.q_proj.weight"], untrained["layers.0.attention.q_proj.weight"])


def test_starts_from_an_adapter_whose_saving_was_cut_short(make_lesson: MakeLesson) -> None:
    """Its config names weights that have not yet taken the place of older ones."""
    taken = make_lesson().train(schedule__steps=1)
    saved = weights(taken)
    (taken / "adapter.safetensors").rename(taken / ".adapter.safetensors.next")
    save_file({name: torch.zeros_like(value) for name, value in saved.items()}, taken / "adapter.safetensors")
    recipe = make_lesson().settings(adapter__init=str(taken))
    adapter = new_adapter(load_target(recipe)[0], recipe)
    assert all(torch.equal(value, saved[name]) for name, value in adapter.state_dict().items())


def test_starts_from_a_trained_adapter_of_another_run(make_lesson: MakeLesson) -> None:
    shipped = {"target": str(TARGET), "adapter__exit_layer": 1, "adapter__variant": "full-layer"}
    shipped |= {"adapter__init": str(ADAPTER)}
    recipe = make_lesson().settings(**shipped)
    adapter = new_adapter(load_target(recipe)[0], recipe)
    expected = {n if n == "norm_out.weight" else f"layers.0.{n}": t for n, t in weights(ADAPTER).items()}
    assert all(torch.equal(value, expected[name]) for name, value in adapter.state_dict().items())
    assert all(parameter.requires_grad for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__exit_layer": 1}, r"adapter\.exit_layer is 1, but the adapter that adapter\.init names has 2"),
        ({"adapter__variant": "mlp-only"}, r"adapter\.variant is 'mlp-only', but .* names has 'kangaroo'"),
    ],
)
def test_starting_from_another_shape_is_refused(make_lesson: MakeLesson, changes: dict[str, Any], message: str) -> None:
    taken, run = make_lesson().train(schedule__steps=1), make_lesson()
    with pytest.raises(ConfigError, match=message):
        run.train(adapter__init=str(taken), **changes)
    assert not run.output.exists()


def test_starting_from_no_adapter_is_refused(make_lesson: MakeLesson, tmp_path: Path) -> None:
    heads, run = make_lesson(lesson.MEDUSA).train(schedule__steps=1), make_lesson()
    for init, message in [
        (tmp_path, f"no adapter in {tmp_path}"),
        (heads, "no adapter in .* says Medusa heads"),
        ("targt", "no adapter in targt"),
        (ADAPTER, "width 128, but the target has 32"),
    ]:
        with pytest.raises(AdapterError, match=message):
            run.train(adapter__init=str(init))
    assert not run.output.exists()


# The run


def test_training_raises_agreement_and_keeps_the_best(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    best = run.train(schedule__steps=20)
    rows = [row for row in run.rows() if "held_out/score" in row]
    assert rows[-1]["held_out/sum_min"] > rows[0]["held_out/sum_min"]
    config = json.loads((best / "config.json").read_text())
    calibration = Calibration.load(best)
    assert 0 < calibration.after_right <= 1
    assert calibration.right[0] <= calibration.right[-1]
    scores = [row["held_out/score"] for row in rows]
    kept = config["provenance"]
    assert kept["held_out"]["simulated_cr"] == max(scores)
    assert kept["steps"] == next(row["step"] for row in rows if row["held_out/score"] == max(scores))
    assert kept["recipe"]["adapter"]["exit_layer"] == 2
    assert set(kept["sha256"]) == {"data", "target"}
    assert {"torch", "transformers", "python"} <= set(kept["versions"])


def test_reports(make_lesson: MakeLesson) -> None:
    events: list[Any] = []
    make_lesson().train(report=events.append, schedule__steps=4)
    (estimate,) = [e for e in events if isinstance(e, RunEstimate)]
    assert estimate.parameters == 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32
    assert estimate.training_bytes == 16 * estimate.parameters
    assert estimate.seconds > 3 * estimate.seconds_per_step > 0
    assert estimate.fits
    updates = [e for e in events if isinstance(e, Update)]
    assert [u.stage for u in updates] == [
        "answer",
        "answer",
        "train",
        "train",
        "evaluate",
        "train",
        "train",
        "evaluate",
    ]
    assert [u.done for u in updates if u.stage == "train"] == [1, 2, 3, 4]
    assert updates[-1].eta == 0 < updates[2].eta < float("inf")
    assert updates[-1].figures["held_out/simulated_cr"] >= 1


def test_tensorboard(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    run = make_lesson()
    run.train(schedule__steps=2, run__tensorboard=True)
    assert list((run.output / "tensorboard").glob("events*"))
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"run\.tensorboard needs the train extra"):
        make_lesson().train(run__tensorboard=True)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"adapter__exit_layer": 5}, ConfigError, "exit layer must be in 0..4"),
        ({"schedule__sequence_length": 200}, ConfigError, "exceed the target's context of 128"),
        ({"target": "/nowhere"}, ModelError, "cannot load a causal LM from /nowhere"),
    ],
)
def test_refused_before_it_starts(
    make_lesson: MakeLesson, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    run = make_lesson()
    with pytest.raises(kind, match=message):
        run.train(**changes)
    assert not run.output.exists()


def test_out_of_memory_says_what_to_lower(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(AdapterObjective, "compare", fail)
    with pytest.raises(CapacityError, match=r"2 sequences of 64 tokens do not fit.*schedule\.accumulate"):
        make_lesson().train()


def test_nan_in_the_target_is_refused(make_lesson: MakeLesson, target_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(target_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        make_lesson().train(target=str(broken))


@pytest.mark.parametrize("at_once", [1 << 20, 1 << 10])
def test_only_the_loss_has_gradients(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    objective, packed = build(make_lesson(), loss__acceptance=1.0)
    monkeypatch.setattr(objective_file, "AT_ONCE", at_once)
    batch = packed.batch(0, 1, 64, seed=0)
    compared = objective.compare(*objective._states(batch, learnt_positions(batch)))
    needs = {field.name: getattr(compared, field.name).requires_grad for field in dataclasses.fields(compared)}
    assert needs == {"loss": True, "cross_entropy": False, "overlap": False, "agreement": False, "lost": False}
