"""transformers' own generate as a method: the same texts, ends and rounds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from little_runs import TOKENS, MakeRecipe, by_method

import kangaroo
from kangaroo.bench.compare import without_end
from kangaroo.bench.drafted import Drafted
from kangaroo.bench.peers import make_peer
from kangaroo.bench.records import BASELINE
from kangaroo.bench.run import run_bench
from kangaroo.decoder import Decoder
from kangaroo.errors import ConfigError
from kangaroo.sampling import Sampling


def test_peers_write_the_same_text(recipe: MakeRecipe, model: Path) -> None:
    peers = [
        {"name": "transformers", "kind": "transformers"},
        {"name": "lookup", "kind": "transformers", "prompt_lookup_num_tokens": 4},
        {
            "name": "assisted",
            "kind": "transformers",
            "draft_model": str(model / "target"),
            "num_assistant_tokens": 3,
            "assistant_confidence_threshold": 0.0,
        },
    ]
    methods = by_method(run_bench(recipe(methods=peers, end="barred"), limit=2))
    for peer in peers:
        for mine, plain in zip(methods[str(peer["name"])], methods[BASELINE], strict=True):
            assert [turn.tokens for turn in mine.turns] == [turn.tokens for turn in plain.turns]
            for turn in mine.turns:
                assert sum(turn.emitted) == len(turn.tokens) == TOKENS
                assert (turn.prefill, turn.draft, turn.verify) == (0, 0, 0)
                assert turn.rest > 0
    assert all(set(turn.emitted) == {1} for record in methods["transformers"] for turn in record.turns)
    assisted = [emitted for record in methods["assisted"] for turn in record.turns for emitted in turn.emitted]
    assert max(assisted) == 4, "a model that assists itself is always right"


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 4}])
def test_peers_end_where_plain_decoding_ends_and_not_where_ends_are_barred(
    model: Path, settings: dict[str, int]
) -> None:
    plain = kangaroo.load(model / "target", drafter="none", dtype=torch.float64)
    prompt = plain.tokenizer.encode("I need 3 tickets")
    text = Drafted(plain).answer([prompt], Sampling(), 12)[0].tokens
    ending = Decoder(plain.target, plain.make_drafter, plain.tokenizer, (text[5],))
    for sampling in (Sampling(), without_end(Sampling(), ending.eos)):
        (mine,) = make_peer(ending, settings, 1).answer([prompt], sampling, 12)
        (expected,) = Drafted(ending).answer([prompt], sampling, 12)
        assert (mine.tokens, mine.finish_reason) == (expected.tokens, expected.finish_reason)
        assert mine.finish_reason == ("length" if sampling.logit_bias else "stop")


def test_a_plain_peer_takes_batches_and_others_refuse_them(recipe: MakeRecipe, tmp_path: Path) -> None:
    peer = {"name": "transformers", "kind": "transformers"}
    methods = by_method(run_bench(recipe(methods=[peer], batch=3)))
    for mine, plain in zip(methods["transformers"], methods[BASELINE], strict=True):
        assert [turn.tokens for turn in mine.turns] == [turn.tokens for turn in plain.turns]
    with pytest.raises(ConfigError, match="one prompt at a time, got batch = 3"):
        run_bench(recipe(methods=[{**peer, "prompt_lookup_num_tokens": 4}], batch=3, output=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokns": 3}, "did you mean 'prompt_lookup_num_tokens'"),
        ({"prompt_lookup_num_tokens": 3, "draft_model": "x"}, "not both"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size needs prompt_lookup_num_tokens"),
        ({"draft_model": "demo"}, "no draft model came with this model"),
    ],
)
def test_settings_of_peers_that_cannot_be(recipe: MakeRecipe, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_bench(recipe(methods=[{"name": "t", "kind": "transformers", **settings}]))
