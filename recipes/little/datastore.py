"""Build the datastore that ships with the little model: what its target answers to prompts of its training documents.

    python recipes/little/datastore.py --data chat_open.jsonl.gz --output runs/little.rest

The text is the target's own, greedy: what drafts should foretell. None of the answers in the data is in it.
The prompts are those of the Medusa heads' training documents: none of the evaluation prompts is among them.
"""

import argparse
from pathlib import Path

from kangaroo import Sampling
from kangaroo.decoder import load
from kangaroo.documents import Document
from kangaroo.drafters.copying.datastore import build_datastore
from kangaroo.state import Request
from kangaroo.training.corpus import choose_documents, prompts
from kangaroo.training.recipe import read_recipe
from kangaroo.training.target_text import Writer

ANSWERS, TOKENS, BATCH = 1200, 64, 16


def main() -> None:
    """Let the target write, then index what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    recipe = read_recipe(Path("recipes/little/medusa.toml"))
    decoder = load("tests/little/target", drafter="none")
    documents, _ = choose_documents([options.data], recipe.data, recipe.seed)
    asked = prompts(documents[: 2 * ANSWERS], decoder.tokenizer.wrapped, recipe.seed)
    # Prompts of like length together: a batch takes as long as its longest.
    asked = sorted((p for p in asked if len(p) <= 256), key=len)[:ANSWERS]
    writer = Writer(decoder.target, decoder.eos, BATCH, lambda update: None)
    requests = [Request(prompt, Sampling(), TOKENS) for prompt in asked]
    answers = writer.answer("answer", requests, options.output.with_suffix(".jsonl"))
    texts = [Document("little", text=decoder.tokenizer.decode(answer)) for answer in answers]
    built = build_datastore([d for d in texts if d.text.strip()], decoder.tokenizer.wrapped, options.output)
    print(f"{options.output}: {built.documents} answers, {built.tokens} tokens")


if __name__ == "__main__":
    main()
