"""Files to documents, documents to tokens, tokens to batches."""

import gzip
import json
from pathlib import Path
from typing import Any

import lesson
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.documents import Document, prompts, read_documents
from kangaroo.errors import DataError
from kangaroo.training.batches import Batch, Joined, Packed, learnt_positions, place_documents, visit
from kangaroo.training.corpus import Corpus, choose_documents, render, tokenize
from kangaroo.training.recipe import DataSection

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens are numbered through, every token but each document's first one marked."""
    numbers = iter(range(10**6))
    return Corpus.join([([next(numbers) for _ in range(n)], [False] + [True] * (n - 1)) for n in lengths])


# Files


def test_formats_hold_the_same_documents(tmp_path: Path) -> None:
    rows = [{"source": "a", "messages": CHAT}, {"text": "plain"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    plain, packed, parquet = tmp_path / "d.jsonl", tmp_path / "d.jsonl.gz", tmp_path / "d.parquet"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    import pyarrow
    import pyarrow.parquet

    # A table has every column in every row: those that a row does not use are null.
    full = [{"source": None, "messages": None, "text": None, **row} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full), parquet)
    read = [[(d.source, d.messages, d.text) for d in read_documents(path)] for path in (plain, packed, parquet)]
    assert read[0] == read[1] == read[2] == [("a", CHAT, ""), ("data", None, "plain")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [', "line 2: not JSON"),
        ('{"prompt": "x"}', 'line 2: expected an object with "messages" or "text"'),
        ('{"messages": []}', "line 2.*non-empty list"),
        ('{"messages": [{"role": "user"}]}', "line 2.*role"),
        ('{"text": " "}', "line 2.*non-empty string"),
        ("[1]", "line 2: expected an object"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{row}\n')
    with pytest.raises(DataError, match=message):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-9]), ("bad.jsonl", b'{"text": "\xff"}')],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        list(read_documents(tmp_path / name))


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        list(read_documents(tmp_path / "absent.jsonl"))
    (tmp_path / "d.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="expected a file ending in"):
        list(read_documents(tmp_path / "d.csv"))
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DataError, match="too few to hold out 3"):
        choose_documents([tmp_path / "e.jsonl"], DataSection(held_out=3), 0)


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    path = lesson.write_rows(tmp_path / "d.jsonl", [{"text": f"text {i}"} for i in range(20)])
    training, held_out = choose_documents([path], DataSection(held_out=5, limit=10), seed=3)
    assert len(training) == 10
    assert len(held_out) == 5
    assert not {d.text for d in training} & {d.text for d in held_out}
    assert (training, held_out) == choose_documents([path], DataSection(held_out=5, limit=10), seed=3)


# Templates


def spans_of(document: Document, tokenizer: Any) -> list[list[str]]:
    return [[text[a:b] for a, b in spans] for text, spans in render(document, tokenizer, True)]


def test_only_answers_and_their_end_are_marked() -> None:
    tokenizer = lesson.make_tokenizer()
    document = Document("d", messages=lesson.conversations()[1]["messages"])
    assert spans_of(document, tokenizer) == [["Bo eats rice.<|end|>", "Then Bo eats rice again.<|end|>"]]
    corpus = tokenize([document], tokenizer, assistant_only=True)
    assert tokenizer.decode(corpus.tokens[corpus.trained]) == "Bo eats rice.<|end|>Then Bo eats rice again.<|end|>"
    assert tokenize([document], tokenizer, assistant_only=False).trained.all()


# Like the templates of models that think: earlier answers lose what the last one keeps.
FORGETFUL = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# The generation prompt promises something that a finished answer does not contain.
CONTRADICTING = FORGETFUL.replace("'[assistant]'", "'[assistant]<think>hm'")


def test_template_that_rewrites_history_makes_one_text_per_answer() -> None:
    tokenizer = lesson.make_tokenizer()
    tokenizer.chat_template = FORGETFUL
    document = Document(
        "d", messages=[*CHAT, {"role": "user", "content": "So"}, {"role": "assistant", "content": "No"}]
    )
    texts = [text for text, _ in render(document, tokenizer, True)]
    assert texts == [
        "[user]Hi[assistant]<think></think>Yes",
        "[user]Hi[assistant]Yes[user]So[assistant]<think></think>No",
    ]
    assert spans_of(document, tokenizer) == [["<think></think>Yes"], ["<think></think>No"]]
    assert len(render(document, tokenizer, False)) == 1


def test_template_that_contradicts_itself_is_named() -> None:
    tokenizer = lesson.make_tokenizer()
    tokenizer.chat_template = CONTRADICTING
    with pytest.raises(DataError, match=r"d\.jsonl, line 3: the chat template .* data.assistant_only = false"):
        render(Document("d", messages=CHAT, where="d.jsonl, line 3"), tokenizer, True)


def test_template_that_refuses_is_named() -> None:
    tokenizer = lesson.make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 3: the chat template refuses this conversation: roles must alternate"):
        render(Document("d", messages=CHAT, where="line 3"), tokenizer, True)


def test_without_template_only_plain_text_will_do() -> None:
    tokenizer = lesson.make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenize([Document("d", messages=CHAT)], tokenizer, assistant_only=True)
    assert tokenize([Document("d", text="Some text.")], tokenizer, assistant_only=True).trained.all()


def test_prompts_are_what_decoding_sees() -> None:
    tokenizer = lesson.make_tokenizer()
    plain = Document("d", text="Ada eats soup and Bo eats rice and then both eat plums.")
    chat, text = prompts([Document("d", messages=CHAT), plain], tokenizer, seed=0)
    assert tokenizer.decode(chat) == "<|begin|><|user|>Hi<|end|><|assistant|>"
    whole = tokenizer("<|begin|>" + plain.text)["input_ids"]
    assert whole[: len(text)] == text
    assert len(whole) / 4 - 1 < len(text) <= len(whole) / 2


# Order


@given(rows=st.integers(1, 5), blocks=st.integers(1, 12), seed=st.integers(0, 3))
def test_every_block_once_per_epoch(rows: int, blocks: int, seed: int) -> None:
    steps = -(-2 * blocks // rows)
    seen = np.concatenate([visit(step, rows, blocks, seed) for step in range(steps)])
    assert sorted(seen[:blocks]) == sorted(seen[blocks : 2 * blocks]) == list(range(blocks))
    # Any step alone gives what it gives in order.
    assert (visit(steps - 1, rows, blocks, seed) == seen[(steps - 1) * rows :]).all()


@given(rows=st.integers(1, 3), accumulate=st.integers(1, 4), step=st.integers(0, 9))
def test_micro_batches_are_the_joint_batch_in_parts(rows: int, accumulate: int, step: int) -> None:
    stream = Joined(corpus_of([50, 31]))
    joint = stream.batch(step, rows * accumulate, 8, seed=1).tokens
    parts = [stream.batch(step * accumulate + i, rows, 8, seed=1).tokens for i in range(accumulate)]
    assert torch.equal(joint, torch.cat(parts))


def test_stream_reads_every_token_as_the_next_of_another() -> None:
    stream = Joined(corpus_of([10, 7, 16]))
    tokens = stream.batch(0, 4, 8, seed=0).tokens
    assert sorted(tokens[:, 1:].flatten().tolist()) == list(range(1, 33))
    with pytest.raises(DataError, match="33 tokens of text are fewer than one sequence of 33"):
        stream.batch(0, 1, 33, seed=0)


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=30), length=st.integers(4, 12))
def test_packing_keeps_documents_whole_and_apart(lengths: list[int], length: int) -> None:
    packed = Packed(corpus_of(lengths))
    worth = [i for i, n in enumerate(lengths) if n > 1]  # a single token predicts nothing
    if not worth:
        with pytest.raises(DataError, match=r"no document has a token to learn from .* what the assistant answers"):
            packed.rows(length)
        return
    rows = packed.rows(length)
    assert sorted(i for row in rows for i in row) == worth
    batch = packed.lay_out(rows, length)
    where, mask = place_documents(batch), learnt_positions(batch)
    assert batch.documents is not None
    for r, members in enumerate(rows):
        for place, member in enumerate(members):
            at = (batch.documents[r] == place).nonzero()[:, 0]
            ids, _ = packed.corpus.document(member)
            assert batch.tokens[r, at].tolist() == ids[:length].tolist()
            assert where.positions[r, at].tolist() == list(range(len(at)))
            # Each token sees its own document up to itself: the first one included, from every later one.
            for i, slot in enumerate(at):
                assert where.mask[r, slot].nonzero()[:, 0].tolist() == at[: i + 1].tolist()
            # Everything but the last token, which has no successor, is learnt from.
            assert mask[r, at].tolist() == [True] * (len(at) - 1) + [False]
    assert int(mask.sum()) == sum(min(length, lengths[i]) - 1 for i in worth)


def test_mask_starts_at_the_last_token_of_the_prompt() -> None:
    marks = torch.tensor([[False, False, True, True, False, False, True]])
    batch = Batch(torch.arange(7)[None], marks, torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))
    assert learnt_positions(batch).tolist() == [[False, True, True, False, False, True, False]]
    # A marked first token of the next document is nobody's successor.
    marks[0, 4] = True
    assert not learnt_positions(batch)[0, 3]
