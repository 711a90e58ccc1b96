"""What Medusa heads learn from, and that the drafting simulated for them is the drafting they then do."""

import json
from collections.abc import Callable

import lesson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lesson import Lesson, build_medusa
from torch.nn import functional

from kangaroo.decode import decode, start
from kangaroo.drafters.medusa.drafter import Medusa, MedusaChainConfig
from kangaroo.drafters.medusa.heads import MedusaHeads
from kangaroo.errors import ConfigError
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.training import objective as objective_file
from kangaroo.training.batches import Batch, Packed
from kangaroo.training.estimate import RunEstimate
from kangaroo.training.evaluation import parallel_rounds
from kangaroo.training.medusa import NOTHING, MedusaObjective
from kangaroo.tree import sequence

MakeLesson = Callable[..., Lesson]
HEADS = 3


def practise(objective: MedusaObjective, packed: Packed) -> None:
    """A few steps, so that every weight counts and some predictions are right."""
    optimizer = torch.optim.AdamW(objective.parameters().values(), lr=0.02)
    for number in range(12):
        loss = objective.loss(packed.batch(number, 2, 64, seed=0))
        (loss.total / loss.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(objective: MedusaObjective) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in objective.parameters().items() if p.grad is not None}
    for parameter in objective.parameters().values():
        parameter.grad = None
    return taken


# Loss


def test_loss_is_that_of_each_document_alone(make_lesson: MakeLesson) -> None:
    """Packed and masked: the same sums as a plain loop over documents, positions and heads."""
    objective, packed = build_medusa(make_lesson(lesson.MEDUSA), loss__decay=0.7)
    practise(objective, packed)
    target, heads = objective.target, objective.heads
    rows = packed.rows(64)[:3]
    batch = packed.lay_out(rows, 64)
    loss, figures = objective.loss(batch), objective.measure(batch)
    sums, right, counts = [0.0] * HEADS, [0] * HEADS, [0] * HEADS
    confirmed = 0
    for tokens, marks in (packed.corpus.document(i) for row in rows for i in row):
        ids = torch.from_numpy(tokens[:64].astype("int64"))
        x, _ = target.run(target.embed(ids[None]), sequence(1, len(ids)), None)
        log_q = heads(target.norm(x)[0]).detach().log_softmax(-1)
        for t in range(len(ids)):
            run = True
            for i in range(HEADS):
                at = t + 2 + i
                learnt = at < len(ids) and bool(marks[at])
                hit = learnt and int(log_q[t, i].argmax()) == int(ids[at])
                if learnt:
                    sums[i] -= float(log_q[t, i, ids[at]])
                    right[i] += hit
                    counts[i] += 1
                run = run and hit
                confirmed += run
    assert loss.tokens == counts[0] > 20
    assert counts[0] >= counts[1] >= counts[2] > 0
    want = sum(0.7**i * total for i, total in enumerate(sums))
    assert float(loss.total.detach()) == pytest.approx(want, rel=1e-5)
    assert loss.extra == {"accuracy": right[0], "confirmed": confirmed}
    assert 0 < right[0] < confirmed < sum(right)
    for i in range(HEADS):
        assert figures[f"loss_{i}"] == (pytest.approx(sums[i], rel=1e-5), counts[i])
        assert figures[f"accuracy_{i}"] == (right[i], counts[i])


def test_what_each_head_is_to_predict(make_lesson: MakeLesson) -> None:
    """Marked tokens of the same document, two and more ahead; the first row holds two documents."""
    objective, _ = build_medusa(make_lesson(lesson.MEDUSA))
    batch = Batch(
        tokens=torch.tensor([[10, 11, 12, 13, 20, 21, 22, 23]]),
        trained=torch.tensor([[True, True, True, True, False, False, True, True]]),
        documents=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]),
    )
    assert objective.wanted(batch)[0].tolist() == [
        [12, 13, NOTHING],
        [13, NOTHING, NOTHING],
        [NOTHING] * 3,
        [NOTHING] * 3,
        [22, 23, NOTHING],
        [23, NOTHING, NOTHING],
        [NOTHING] * 3,
        [NOTHING] * 3,
    ]


def test_logits_in_pieces_give_the_same_gradients(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, packed = build_medusa(make_lesson(lesson.MEDUSA))
    practise(objective, packed)
    batch = packed.batch(0, 2, 64, seed=0)
    whole = objective.loss(batch)
    whole.total.backward()
    expected = gradients(objective)
    assert len(expected) == 3 * HEADS
    made: list[int] = []
    real = MedusaHeads.logits
    monkeypatch.setattr(MedusaHeads, "logits", lambda self, i, x: made.append(len(x)) or real(self, i, x))
    monkeypatch.setattr(objective_file, "LOGITS_AT_ONCE", 7 * HEADS * objective.target.vocab_size)
    parts = objective.loss(batch)
    parts.total.backward()
    assert max(made) == 7
    assert parts.extra == whole.extra
    assert float(parts.total.detach()) == pytest.approx(float(whole.total.detach()), rel=1e-6)
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


def test_heads_learn_and_the_target_does_not(make_lesson: MakeLesson) -> None:
    objective, packed = build_medusa(make_lesson(lesson.MEDUSA))
    objective.loss(packed.batch(0, 2, 64, seed=0)).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.target.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters().values())


def test_untrained_heads_predict_what_the_targets_own_head_does(make_lesson: MakeLesson) -> None:
    objective, packed = build_medusa(make_lesson(lesson.MEDUSA))
    batch = packed.batch(0, 2, 64, seed=0)
    wanted, everywhere = objective.wanted(batch), torch.ones_like(batch.trained)
    x = objective.states(batch, everywhere)
    for head in range(HEADS):
        flat = functional.cross_entropy(objective.target.logits(x), wanted[..., head].flatten(), reduction="sum")
        assert objective.measure(batch)[f"loss_{head}"][0] == pytest.approx(float(flat), rel=1e-5)


# The run


def test_training_raises_accuracy_and_keeps_the_best(make_lesson: MakeLesson) -> None:
    run, events = make_lesson(lesson.MEDUSA), list[object]()
    best = run.train(schedule__steps=30, optimizer__learning_rate=0.02, report=events.append)
    rows = [row for row in run.rows() if "held_out/score" in row]
    for head in range(HEADS):
        assert rows[-1][f"held_out/loss_{head}"] < rows[0][f"held_out/loss_{head}"]
        assert rows[-1][f"held_out/accuracy_{head}"] > rows[0][f"held_out/accuracy_{head}"]
    kept = json.loads((best / "config.json").read_text())
    assert kept["heads"] == HEADS
    scores = [row["held_out/score"] for row in rows]
    assert kept["provenance"]["held_out"]["simulated_cr"] == max(scores)
    assert kept["provenance"]["recipe"]["kind"] == "medusa"
    (estimate,) = [event for event in events if isinstance(event, RunEstimate)]
    vocab = kept["vocab_size"]
    assert estimate.parameters == HEADS * (32 * 32 + 32 + 32 * vocab)
    assert MedusaHeads.load(best, build_medusa(run)[0].target).config.heads == HEADS


def test_half_precision_and_regenerated_text(make_lesson: MakeLesson) -> None:
    exact, mixed, half, own = (make_lesson(lesson.MEDUSA) for _ in range(4))
    exact.train(schedule__steps=2)
    mixed.train(schedule__steps=2, run__mixed_precision="bf16")
    half.train(schedule__steps=2, run__dtype="bfloat16")
    own.train(schedule__steps=2, regenerate__prompts=20, regenerate__max_tokens=8)
    losses = [run.rows()[0]["loss"] for run in (exact, mixed, half, own)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)
    assert len(set(losses)) == 4
    assert (own.output / "regenerated.jsonl").is_file()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("medusa__heads", 0, "medusa.heads: .*greater than 0, got 0"),
        ("medusa__init", "zero", "medusa.init: .*got 'zero'"),
        ("loss__decay", 0, "loss.decay: .*greater than 0"),
        ("evaluation__threshold", 0.5, "unknown key 'evaluation.threshold'"),
        ("evaluation__prompts", 99, "evaluation.prompts is 99, more than data.held_out"),
        ("run__compile", True, "run.compile is for targets"),
        ("schedule__sequence_length", 4096, "sequences of 4096 tokens exceed the target's context of 128"),
    ],
)
def test_mistakes_are_named(make_lesson: MakeLesson, key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_lesson(lesson.MEDUSA).train(**{key: value})


# Simulated drafting


def test_simulated_rounds_are_those_of_decoding(make_lesson: MakeLesson) -> None:
    """Same rounds, not only the same rate, with drafts accepted whole, in part and not at all."""
    run = make_lesson(lesson.MEDUSA)
    changes = {"evaluation__max_tokens": 30, "evaluation__prompts": 6}
    own_words = {"regenerate__prompts": 34, "regenerate__max_tokens": 30}
    best = run.train(schedule__steps=40, optimizer__learning_rate=0.02, run__evaluate_every=40, **changes, **own_words)
    objective, _ = build_medusa(run, **changes)
    settings, target = objective.recipe.evaluation, objective.target
    objective.heads = MedusaHeads.load(best, target)
    simulated, right = objective.held_out.simulate(objective)
    measured = []
    written, answers = objective.held_out.written, objective.held_out.answers
    for index, answer in enumerate(answers):
        prompt = written.corpus.document(index)[0][: -len(answer)].tolist()
        drafter = Medusa(target, objective.heads, MedusaChainConfig())
        request = Request(prompt, Sampling(), settings.max_tokens)
        state = start(target, drafter, [request], eos=(int(target.model.config.eos_token_id),))
        measured.append([len(done.emitted[0]) for done in decode(target, drafter, state)])
    assert [sum(rounds) for rounds in measured] == [len(answer) for answer in answers]
    assert simulated == measured
    lengths = {n for rounds in measured for n in rounds}
    assert lengths >= {1, 2, HEADS + 1}
    assert 0 < right < sum(map(len, answers))


def test_answers_to_prompts_of_one_token_begin_without_a_draft(make_lesson: MakeLesson) -> None:
    """There is no state two tokens before the answer: what precedes it in its row is another document."""
    objective, _ = build_medusa(make_lesson(lesson.MEDUSA))
    batch = Batch(
        tokens=torch.tensor([[5, 6, 7, 8, 9, 10, 11]]),
        trained=torch.tensor([[False, True, True, False, True, True, False]]),
        documents=torch.tensor([[0, 0, 0, 1, 1, 1, 2]]),
    )
    # Heads that always say 7, 9 and 9: were they asked across the border, the second document's first token would fit.
    for head, token in enumerate((7, 9, 9)):
        objective.heads.maps[head] = torch.nn.Linear(32, objective.target.vocab_size)
        objective.heads.maps[head].weight.data.zero_()
        objective.heads.maps[head].bias.data.zero_()[token] = 1.0
    nothing = (False,) * HEADS
    assert objective.judge(batch) == [nothing, (True, False, False), nothing, nothing]


@given(st.data())
def test_simulation_is_the_round_by_round_definition(data: st.DataObject) -> None:
    count, heads = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 4))
    hits = st.lists(st.booleans(), min_size=heads, max_size=heads)
    correct = data.draw(st.lists(hits, min_size=count, max_size=count))
    room, position = count + data.draw(st.integers(0, 3)), 0
    for emitted in parallel_rounds(correct):
        accepted = 0
        while accepted < heads and accepted + 1 < room - position and position + accepted < count:
            if not correct[position][accepted]:
                break
            accepted += 1
        assert emitted == min(accepted + 1, count - position)
        position += emitted
    assert position == count
