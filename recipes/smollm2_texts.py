"""Choose what SmolLM2's adapter learns from among the model's own answers, and hold some prompts out for good.

    python recipes/smollm2_texts.py smollm2_answers.jsonl.gz runs/answers.jsonl --held-out runs/dev.jsonl \\
        --output runs/texts.jsonl [--chats chat_open.jsonl.gz] [--books books_public_domain.jsonl.gz]

Held out are prompts of the first file. Of the rest, answers that go round in circles are mostly left out (a model of
this size often does, and little is to be learnt there), and so are half of those with a long prompt: a step pays for
every token, and learns from the answer's. With `--chats`, for a longer run, nothing is left out, and conversations that
the model has not written are mixed in: what it writes itself is soon learnt by heart. With `--books` prose is mixed in
too. What quotes a prompt held out is not.
"""

import argparse
import json
import random
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from kangaroo.demo.smollm2 import smollm2
from kangaroo.documents import read_documents
from kangaroo.files import write_text
from kangaroo.loading import load_tokenizer
from kangaroo.text import Tokenizer

HELD_OUT, LENGTH, SHORTEST = 130, 512, 24
"""Prompts held out; tokens of a row of training; tokens of an answer worth a row's place."""
DENSE, CIRCULAR = 0.58, 0.5
"""The answer's share of a document's tokens; the share of its runs of four tokens that are not repeated."""
KEPT = {"dense": 1.0, "long": 0.5, "circular": 0.4}
CHATS = {
    "gpteacher_codegen": 4000,
    "gpteacher_roleplay": 1900,
    "gsm8k_train": 7000,
    "flan_cot": 10000,
    "sgd_train": 3500,
    "arena_hard_v01": 2200,
    "qmsum_train": 830,
}
"""Conversations of each source that are mixed in, of so many tokens:"""
CHAT_LENGTHS = (60, 2000)
BOOKS = 1600
"""Passages of books that are mixed in, each about a thousand tokens of plain text."""


def main() -> None:
    """Hold out, choose, write both down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, nargs="+")
    for name in ("held-out", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("chats", "books"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    files = [[{"source": d.source, "messages": d.messages} for d in read_documents(path)] for path in options.answers]
    asked = list(dict.fromkeys(row["messages"][0]["content"] for row in files[0]))
    random.Random(11).shuffle(asked)
    held = set(asked[:HELD_OUT])
    _write(options.held_out, [row for row in files[0] if row["messages"][0]["content"] in held])
    rows = [row for file in files for row in file if row["messages"][0]["content"] not in held]
    tokenizer, draw = Tokenizer(load_tokenizer(smollm2())), random.Random(3)
    draw.shuffle(rows)
    if options.chats is None:
        chosen = [row for row in rows if draw.random() < KEPT.get(kind_of(row, tokenizer), 0)]
    else:
        others = choose_chats(options.chats, held, tokenizer, draw)
        if options.books is not None:
            passages = [{"source": d.source, "text": d.text} for d in read_documents(options.books)]
            others += draw.sample(passages, BOOKS)
        known = set().union(*map(runs_of_words, held))
        chosen = [*rows, *(row for row in others if known.isdisjoint(runs_of_words(_text(row))))]
        draw.shuffle(chosen)
    _write(options.output, chosen)


def choose_chats(path: Path, held: Container[str], tokenizer: Tokenizer, draw: random.Random) -> list[dict[str, Any]]:
    """Conversations as CHATS says, none that begins with a prompt held out."""
    rows = [{"source": d.source, "messages": d.messages} for d in read_documents(path) if d.messages]
    draw.shuffle(rows)
    left, chosen = dict(CHATS), list[dict[str, Any]]()
    for row in rows:
        if left.get(row["source"], 0) and row["messages"][0]["content"] not in held:
            shortest, longest = CHAT_LENGTHS
            if shortest <= len(tokenizer.encode(row["messages"])) <= longest:
                left[row["source"]] -= 1
                chosen.append(row)
    return chosen


def runs_of_words(text: str, length: int = 12) -> set[tuple[str, ...]]:
    """What two texts share if one of them quotes the other."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def kind_of(row: dict[str, Any], tokenizer: Tokenizer) -> str:
    """One of KEPT, or "short": next to nothing to learn from within a row of training."""
    prompt, answer = len(tokenizer.encode(row["messages"][:-1])), tokenizer.encode(row["messages"][-1]["content"])
    if len(answer) < SHORTEST or prompt + SHORTEST > LENGTH:
        return "short"
    runs = {tuple(answer[i : i + 4]) for i in range(len(answer) - 3)}
    if len(runs) < CIRCULAR * (len(answer) - 3):
        return "circular"
    return "dense" if len(answer) > DENSE * (len(answer) + prompt) else "long"


def _text(row: dict[str, Any]) -> str:
    return str(row["text"]) if "text" in row else "\n".join(m["content"] for m in row["messages"])


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} documents")


if __name__ == "__main__":
    main()
