"""Choose the prompts whose answers the little adapter learns from: short ones, and ones that fill the target's context.

    python recipes/little/prompts.py --chats chat_open.jsonl.gz --books books_public_domain.jsonl.gz \\
        --output prompts.jsonl

Chats are training documents of the little target: what it held out, evaluation prompts among it, is left out here too.
Few of them are long, so tasks about passages of books are added: to sum up, to answer about several, to go on.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from kangaroo.documents import Document, read_documents
from kangaroo.files import write_text
from kangaroo.loading import load_tokenizer
from kangaroo.training.corpus import choose_documents
from kangaroo.training.recipe import read_recipe

SHORT, MEETINGS, BOOKS = 4800, 400, 800
SHORTEST, LONGEST = 200, 860
"""Tokens of a task about a book."""
TASKS = (
    "Sum up the following text in a few sentences.\n\n{}",
    "{}\n\nWrite a short summary of the text above.",
    "Here are passages from a library.\n\n{}\n\nWhat is the second passage about?",
    "Use the passages below to answer the question at the end.\n\n{}\n\nQuestion: who is spoken of, and what happens?",
    "Continue this text in the same style.\n\n{}",
    "Explain what the writer means.\n\n{}",
)


def main() -> None:
    """Write the documents down, in an order of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("chats", "books", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    recipe = read_recipe(Path("recipes/little/target.toml"))
    chats, _ = choose_documents([options.chats], recipe.data, recipe.seed)
    meetings = [chat for chat in chats if chat.source == "qmsum_train"][:MEETINGS]
    rows = [{"source": d.source, "messages": d.messages} for d in (*chats[:SHORT], *meetings)]
    rows += _about_books(list(read_documents(options.books)), random.Random(recipe.seed))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(options.output, text)
    print(f"{options.output}: {len(rows)} documents")


def _about_books(books: list[Document], draw: random.Random) -> Iterator[dict[str, object]]:
    tokenizer = load_tokenizer("tests/little/target")
    for book in draw.sample(books, BOOKS):
        tokens = tokenizer(book.text, add_special_tokens=False, verbose=False)["input_ids"]
        passage = tokenizer.decode(tokens[: draw.randint(SHORTEST, LONGEST)])
        # What the assistant says is never read: the target answers in its own words.
        task = [{"role": "user", "content": draw.choice(TASKS).format(passage)}, {"role": "assistant", "content": "."}]
        yield {"source": "books", "messages": task}


if __name__ == "__main__":
    main()
