"""Let SmolLM2 answer the prompts that its adapter learns from: chats' and tasks about passages of books.

    python recipes/smollm2_answers.py --chats chat_open.jsonl.gz --books books_public_domain.jsonl.gz \\
        --without smollm2_answers.jsonl.gz --output runs/answers.jsonl [--shortest 420 --longest 1400]

Most answers are greedy, the others sampled. A run that was stopped goes on where it stopped; the prompts come in an
order of their own, so that any beginning of the file is as mixed as the whole.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kangaroo.decode import prefill, start, step
from kangaroo.demo.smollm2 import smollm2
from kangaroo.documents import read_documents
from kangaroo.drafters.none import NoDrafter
from kangaroo.loading import end_tokens, load_model, load_tokenizer
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.text import Tokenizer

PROMPTS = {
    "arena_hard_v01": 1000,
    "gpteacher_roleplay": 1650,
    "gpteacher_codegen": 1700,
    "gsm8k_train": 1600,
    "sgd_train": 1300,
    "flan_cot": 1300,
    "qmsum_train": 300,
    "books": 1800,
}
"""How many are taken of each source."""
MAX_TOKENS = 200
"""Tokens of an answer."""
PASSAGE = (60, 0.76)
"""Tokens of a passage of a book: from so many to this share of the longest prompt's."""
SAMPLED, TEMPERATURE = 0.4, 0.8
"""The share of answers that are sampled."""
TASKS = (
    "Summarize: {}",
    "Sum up the following text in a few sentences.\n\n{}",
    "{}\n\nWrite a short summary of the text above.",
    "Use the passage below to answer the question at the end.\n\n{}\n\nQuestion: who is spoken of, and what happens?",
    "{}\n\nAsk three questions about this text and answer them.",
    "Continue this text in the same style.\n\n{}",
    "Explain what the writer means.\n\n{}",
    "Rewrite this in simple modern English: {}",
    "Translate into German: {}",
    "Make a list of the main points of this passage.\n\n{}",
)
SEED, REFILL, ALIKE, AT_ONCE = 7, 12, 300, 60_000
"""Rows of answers are as many as have AT_ONCE tokens together."""


def main() -> None:
    """Answer until every prompt is answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("chats", "books", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="leave out the prompts answered there")
    parser.add_argument("--shortest", type=int, default=0, help="tokens of a prompt, at least")
    parser.add_argument("--longest", type=int, default=420, help="and at most")
    options = parser.parse_args()
    lengths = range(options.shortest, options.longest + 1)
    folder = smollm2()
    model, tokenizer = load_model(folder, torch.bfloat16), Tokenizer(load_tokenizer(folder))
    answered = (document for path in options.without for document in read_documents(path))
    taken = {document.messages[0]["content"] for document in answered if document.messages}
    asked = choose_prompts(options.chats, options.books, frozenset(taken), tokenizer, lengths)
    known = {json.loads(line)["number"] for line in options.output.open()} if options.output.is_file() else set[int]()
    todo = [(number, row) for number, row in enumerate(asked) if number not in known]
    began, written = time.perf_counter(), 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="utf-8") as file:
        for number, tokens in answer(Target(model), tokenizer, todo, end_tokens(model), options.longest):
            said = {"role": "assistant", "content": tokenizer.decode(tokens).strip()}
            row = {"number": number, **asked[number], "messages": [*asked[number]["messages"], said]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            written += len(tokens)
            rate = written / (time.perf_counter() - began)
            print(f"{number} {len(tokens)} tokens; {written} in all, {rate:.0f} tokens/s", flush=True)


def choose_prompts(
    chats: Path, books: Path, taken: frozenset[str], tokenizer: Tokenizer, lengths: range
) -> list[dict[str, Any]]:
    """Rows without their answers, shuffled: source, temperature, messages."""
    draw = random.Random(SEED)
    by_source: dict[str, list[list[dict[str, str]]]] = {source: [] for source in PROMPTS}
    seen = set(taken)
    for document in read_documents(chats):
        messages = [dict(m) for m in document.messages or ()]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        end = draw.choice(turns) if turns else 0
        key = messages[0]["content"] if end == 1 else json.dumps(messages[:end])
        if document.source in by_source and end and key not in seen:
            seen.add(key)
            by_source[document.source].append(messages[:end])
    passages = [document.text for document in read_documents(books)]
    by_source["books"] = [
        [{"role": "user", "content": task}] for task in about_books(passages, tokenizer, lengths, draw)
    ]
    rows = []
    for source, number in PROMPTS.items():
        shuffled = draw.sample(by_source[source], len(by_source[source]))
        fitting = (messages for messages in shuffled if len(tokenizer.encode(messages)) in lengths)
        rows += [{"source": source, "messages": messages} for messages, _ in zip(fitting, range(number), strict=False)]
    draw.shuffle(rows)
    return [{"temperature": TEMPERATURE if draw.random() < SAMPLED else 0.0, **row} for row in rows]


def about_books(passages: Sequence[str], tokenizer: Tokenizer, lengths: range, draw: random.Random) -> Iterator[str]:
    """Tasks about passages."""
    shortest, share = PASSAGE
    for text in draw.sample(passages, min(len(passages), PROMPTS["books"])):
        ids = tokenizer.encode(text)
        begin = draw.randrange(max(1, len(ids) // 2))
        passage = tokenizer.decode(
            ids[begin : begin + draw.randint(max(shortest, lengths[0]), int(share * lengths[-1]))]
        ).strip()
        yield draw.choice(TASKS).format(passage)


def answer(
    target: Target, tokenizer: Tokenizer, asked: Sequence[tuple[int, dict[str, Any]]], eos: Sequence[int], longest: int
) -> Iterator[tuple[int, list[int]]]:
    """(number, tokens of the answer) as answers are finished; rows that are done take the next prompts."""
    for begin in range(0, len(asked), ALIKE):
        part = asked[begin : begin + ALIKE]
        # Noise is made for whole batches, so that sampled rows have batches of their own.
        for hot in (False, True):
            yield from _answer(
                target, tokenizer, [row for row in part if (row[1]["temperature"] > 0) == hot], eos, longest
            )


def _answer(
    target: Target, tokenizer: Tokenizer, asked: Sequence[tuple[int, dict[str, Any]]], eos: Sequence[int], longest: int
) -> Iterator[tuple[int, list[int]]]:
    waiting = []
    for number, row in asked:
        sampling = Sampling(temperature=row["temperature"], seed=SEED, index=number)
        waiting.append((number, Request(tokenizer.encode(row["messages"]), sampling, MAX_TOKENS)))
    # Prompts of like length side by side: a pass attends to as much as its longest row.
    waiting.sort(key=lambda w: -len(w[1].prompt))
    drafter = NoDrafter()
    capacity = longest + MAX_TOKENS
    while waiting:  # anew now and then, as rows never shrink
        first = [waiting.pop() for _ in range(min(AT_ONCE // capacity, len(waiting)))]
        numbers, texts = [n for n, _ in first], [list[int]() for _ in first]
        state = start(target, drafter, [r for _, r in first], eos=eos, capacity=capacity)
        open_rows = set(range(len(first)))
        while open_rows:
            done = step(target, drafter, state)
            for row in open_rows:
                texts[row] += done.emitted[row]
            finished = [row for row in open_rows if not state.active[row]]
            if len(finished) < REFILL and waiting and len(finished) < len(open_rows):
                continue
            fresh = []
            for row in finished:
                yield numbers[row], texts[row]
                open_rows.discard(row)
                if waiting:
                    numbers[row], request = waiting.pop()
                    texts[row] = []
                    state.assign(row, request)
                    open_rows.add(row)
                    fresh.append(row)
            if fresh:
                prefill(target, drafter, state, torch.tensor(fresh))


if __name__ == "__main__":
    main()
