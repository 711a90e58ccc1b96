"""Datastores: the suffix array against a naive one, the file, and every way in which building or opening one fails."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import kangaroo.drafters.copying.datastore as datastore_file
from chat_model import SENTENCES, save_chat_model
from command import invoke
from kangaroo.documents import Document, read_as_model
from kangaroo.drafters.copying.datastore import KIND, Datastore, Stage, build_datastore
from kangaroo.drafters.copying.suffixes import bytes_to_sort, id_bytes
from kangaroo.errors import CapacityError, ConfigError, DataError, KangarooError
from kangaroo.loading import load_tokenizer
from kangaroo.training.target import train_tokenizer
from runs import index

Documents = list[list[int]]
WIDEST = 100_000


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, Documents, list[int]]:
    """(vocabulary size, documents, a context): few different ids, so that runs recur, of one, two and four bytes."""
    vocab = draw(st.sampled_from([3, 255, 256, 300, 65_535, 65_536, WIDEST]))
    ids = st.sampled_from([i for i in (0, 1, 2, 254, 255, 256, 65_534, 65_535, 65_792, WIDEST - 1) if i < vocab])
    documents = draw(st.lists(st.lists(ids, max_size=12), min_size=1, max_size=6))
    return vocab, documents, draw(st.lists(ids, max_size=12))


def laid_out(documents: Documents, vocab: int) -> list[int]:
    return [token for document in documents for token in (*document, vocab)]


def occurrences(documents: Documents, run: Sequence[int]) -> list[list[int]]:
    """What follows every occurrence of a run, to the end of its document."""
    size = len(run)
    return [d[i + size :] for d in documents for i in range(len(d) - size) if d[i : i + size] == list(run)]


# --- the suffix array


@given(texts())
def test_suffixes_are_in_the_order_of_their_tokens(given_: tuple[int, Documents, list[int]]) -> None:
    vocab, documents, _ = given_
    text, array = laid_out(documents, vocab), index(documents, vocab)
    assert array.order.tolist() == sorted(range(len(text)), key=lambda place: text[place:])
    assert array.documents == len(documents)


@given(texts(), st.integers(1, 3), st.integers(0, 5))
def test_the_longest_run_at_the_end_is_found_with_all_that_follows_it(
    given_: tuple[int, Documents, list[int]], shortest: int, more: int
) -> None:
    vocab, documents, context = given_
    longest, array = shortest + more, index(documents, vocab)
    lengths = range(min(longest, len(context)), shortest - 1, -1)
    expected = next((n for n in lengths if occurrences(documents, context[-n:])), 0)
    length, places = array.find(context, shortest, longest)
    assert length == expected
    assert bool(length) == bool(places)
    if length:
        rows = array.continuations(length, places, 4, 1000).tolist()
        read = [row[: row.index(vocab)] if vocab in row else row for row in rows]
        assert read == sorted(
            (after[:4] for after in occurrences(documents, context[-length:])), key=lambda x: [*x, vocab]
        )


def test_a_run_is_not_found_where_a_document_ends_and_never_across_two() -> None:
    array = index([[4, 5, 3, 9], [3, 4]], 300)
    assert array.find([3, 4], 2, 16) == (0, range(0)), "nothing follows it where it occurs"
    assert array.find([4, 4], 2, 16)[0] == 0, "one document's last token and the next one's first"
    length, places = array.find([7, 3], 1, 16)
    assert length == 1
    assert array.continuations(length, places, 3, 10).tolist() == [[4, 300, 300], [9, 300, 3]]


@pytest.mark.parametrize(("vocab", "foreign"), [(97, 97), (97, 70_000), (255, 255), (65_000, 65_000), (97, 2**40)])
def test_tokens_that_are_not_in_the_vocabulary_are_in_no_run(vocab: int, foreign: int) -> None:
    array = index([[1, 2, 3, 4, 5]], vocab)
    assert array.find([1, 2, foreign], 1, 16)[0] == 0
    assert array.find([foreign, 1, 2, 3], 1, 16)[0] == 3
    assert array.find([1, 2, foreign, 3], 2, 16)[0] == 0


def test_of_many_occurrences_evenly_spread_ones_are_read() -> None:
    array = index([[7, 8, token] for token in range(1000)], 1000)
    length, places = array.find([7, 8], 2, 16)
    assert (length, len(places)) == (2, 1000)
    assert array.continuations(length, places, 1, 5)[:, 0].tolist() == [0, 200, 400, 600, 800]
    assert array.continuations(length, places, 1, 999)[:, 0].tolist() == list(range(999))
    assert array.continuations(length, places, 1, 5000)[:, 0].tolist() == list(range(1000))


def test_a_query_looks_at_a_few_dozen_suffixes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(500, size=(100, 1000))
    array, looks = index(tokens.tolist(), 500), list[int]()
    suffix = type(array)._suffix
    monkeypatch.setattr(type(array), "_suffix", lambda self, at, size: looks.append(at) or suffix(self, at, size))
    assert array.find(tokens[3, 500:516].tolist(), 2, 16)[0] == 16
    assert len(looks) < 150


@pytest.mark.parametrize(
    ("vocab", "size"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4), (200_000, 4), (2**32 - 1, 4)]
)
def test_ids_take_the_bytes_that_they_and_the_end_of_documents_need(vocab: int, size: int) -> None:
    assert id_bytes(vocab) == size


# --- the file


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(SENTENCES, vocab_size=300, context=1024)


TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Oakland."}]
CHAT = Document("data", messages=TURNS)
DOCUMENTS = [*(Document("data", text=sentence) for sentence in SENTENCES), CHAT]


@pytest.fixture
def path(tmp_path: Path, tokenizer: Any) -> Path:
    build_datastore(DOCUMENTS, tokenizer, tmp_path / "tiny.rest")
    return tmp_path / "tiny.rest"


def test_a_datastore_holds_what_the_model_would_read(path: Path, tokenizer: Any) -> None:
    ids = [tokenizer(read_as_model(d, tokenizer), add_special_tokens=False)["input_ids"] for d in DOCUMENTS]
    found, vocab = Datastore.open(path, tokenizer, 1000), len(tokenizer)
    expected = index(ids, vocab)
    assert (found.documents, found.tokens) == (len(DOCUMENTS), sum(map(len, ids)))
    assert found.vocab_size == found.suffixes.vocab_size == vocab
    assert np.array_equal(found.suffixes.tokens, expected.tokens)
    assert np.array_equal(found.suffixes.order, expected.order)
    answer = tokenizer("In Oakland", add_special_tokens=False)["input_ids"]
    length, places = found.suffixes.find(answer, 1, 16)
    assert length == len(answer)
    assert tokenizer.decode(found.suffixes.continuations(length, places, 2, 10)[0]) == "." + tokenizer.eos_token


def test_the_file_says_what_it_is(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        facts = file.metadata()
    assert facts["kind"] == KIND
    assert (facts["version"], facts["documents"]) == ("2", str(len(DOCUMENTS)))
    assert {"vocab_size", "tokenizer", "tokens"} <= set(facts)


def test_a_smaller_model_vocabulary_is_kept_in_mind(path: Path, tokenizer: Any) -> None:
    assert Datastore.open(path, tokenizer, 200).vocab_size == 200


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_an_open_datastore_is_mapped_not_read(path: Path, tokenizer: Any) -> None:
    held = Datastore.open(path, tokenizer, 1000)
    assert str(path) in Path("/proc/self/maps").read_text()
    del held
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_building_says_what_it_is_doing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datastore_file, "_CHUNK", 4)
    seen: list[tuple[Stage, int]] = []
    build_datastore(iter(DOCUMENTS), tokenizer, tmp_path / "new" / "x", lambda stage, done: seen.append((stage, done)))
    assert seen == [("tokenise", 4), ("tokenise", 4), ("tokenise", 2), ("sort", 0), ("write", 0)]


# --- what users get wrong


def refusal(kind: type[KangarooError], act: Callable[[], object]) -> str:
    with pytest.raises(KangarooError) as caught:
        act()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_file_another_file_and_another_safetensors_file(tmp_path: Path, tokenizer: Any) -> None:
    def opened() -> object:
        return Datastore.open(tmp_path / "x", tokenizer, 1000)

    assert "there is no datastore" in refusal(DataError, opened)
    for content in (b"", b"once upon a time", bytes(1000), b"\xff" * 64):
        (tmp_path / "x").write_bytes(content)
        assert "is not a datastore" in refusal(DataError, opened)
    for facts in (None, {"kind": "recipe"}):
        save_file({"tokens": np.zeros((2, 1), np.uint8)}, tmp_path / "x", metadata=facts)
        assert "is not a datastore" in refusal(DataError, opened)


def test_a_file_that_is_cut_short_anywhere(path: Path, tokenizer: Any) -> None:
    whole = path.read_bytes()
    for kept in (1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "cut short" in refusal(DataError, lambda: Datastore.open(path, tokenizer, 1000))


def test_a_newer_version(path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datastore_file, "VERSION", 0)
    message = refusal(DataError, lambda: Datastore.open(path, tokenizer, 1000))
    assert "version 2" in message
    assert "newer" in message


def test_another_tokenizer_even_of_the_same_size(path: Path) -> None:
    other = train_tokenizer([sentence.replace("tickets", "cabbages") for sentence in SENTENCES], 300, 1024)
    message = refusal(DataError, lambda: Datastore.open(path, other, 1000))
    assert "another tokenizer" in message
    assert "kangaroo datastore build" in message


def test_what_tokenizers_were_set_to_is_no_difference(path: Path, tokenizer: Any) -> None:
    same = train_tokenizer(SENTENCES, vocab_size=300, context=77)
    same(["one", "two words"], padding=True, truncation=True, max_length=5)
    same.chat_template = None
    assert Datastore.open(path, same, 1000).documents == len(DOCUMENTS)


def full_disk(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def interrupted(stage: Stage, done: int) -> None:
    if stage == "write":
        raise KeyboardInterrupt


def test_no_file_appears_when_building_fails(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    before = path.read_bytes()

    def build(documents: Sequence[Document] = DOCUMENTS, **more: Any) -> None:
        build_datastore(documents, tokenizer, path, **more)

    with pytest.raises(KeyboardInterrupt):
        build(report=interrupted)
    assert "no documents" in refusal(DataError, lambda: build([]))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", None)
        assert "no chat template" in refusal(DataError, build)
    with monkeypatch.context() as patch:
        patch.setattr(datastore_file, "available_bytes", lambda device: 100)
        message = refusal(CapacityError, build)
        assert "100 B are free" in message
    with monkeypatch.context() as patch:
        patch.setattr(datastore_file, "save_file", full_disk)
        assert "No space left" in refusal(CapacityError, build)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydivsufsort", None)
        assert "kangaroo-decoding[datastore]" in refusal(ConfigError, build)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == {path: before}
    assert "is a folder" in refusal(ConfigError, lambda: build_datastore(DOCUMENTS, tokenizer, tmp_path))


def test_memory_to_sort_is_counted_from_the_bytes() -> None:
    assert bytes_to_sort(1000, 2) == 2000 * 4 + 2 * 1000 * 4
    assert bytes_to_sort(2**30, 4) == 2**32 * 8 + 2 * 2**30 * 4, "places in so many bytes take eight themselves"


# --- the command line


def test_build_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = str(save_chat_model(tmp_path) / "target"), str(tmp_path / "out" / "books.rest")
    (tmp_path / "books.txt").write_text("\n\n\n".join(SENTENCES))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    files = (str(tmp_path / "books.txt"), str(tmp_path / "chats.jsonl"))
    assert invoke("datastore", "build", *files, "--model", model, "--output", output) == 0
    assert f"{output}: {len(DOCUMENTS)} documents, " in capsys.readouterr().out
    assert invoke("datastore", "build", *files, "--model", model, "--output", output, "--json") == 0
    built = Datastore.open(Path(output), load_tokenizer(model), 300)
    facts = json.loads(capsys.readouterr().out)
    assert facts["documents"] == len(DOCUMENTS)
    assert facts["tokens"] == built.tokens
    assert facts["bytes"] == Path(output).stat().st_size
    options = ("generate", "--model", model, "--prompt", "The answer is 42", "--max-tokens", "6", "--json")
    assert invoke(*options, "--drafter", "rest", "--datastore", output) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert invoke(*options, "--drafter", "none") == 0
    plain = json.loads(capsys.readouterr().out)
    assert drafted["answers"][0]["tokens"] == plain["answers"][0]["tokens"]
    assert drafted["stats"]["drafted"] > 0
    assert invoke(*options, "--drafter", "rest") == 2
    assert "kangaroo datastore build" in capsys.readouterr().err
