"""The library's front door: load, stream, generate, stats, and the drop-in for transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kangaroo
from chat_model import save_chat_model
from kangaroo.errors import AdapterError, ConfigError, DataError, ModelError
from kangaroo.sampling import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def load(folder: Path, drafter: str = "kangaroo", **settings: object) -> kangaroo.Decoder:
    adapter = folder / "adapter" if drafter.startswith("kangaroo") else None
    return kangaroo.load(folder / "target", drafter=drafter, adapter=adapter, dtype=torch.float64, **settings)


PROMPTS = ["Where would", "I need 3 tickets", "The"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=4)])
@pytest.mark.parametrize("drafter", ["kangaroo", "kangaroo-tree", "early-exit", "early-exit-tree"])
def test_every_drafter_writes_what_plain_decoding_writes(folder: Path, drafter: str, sampling: Sampling) -> None:
    decoder = load(folder, drafter, threshold=0.05)
    together = decoder.generate(PROMPTS, max_tokens=20, sampling=sampling)
    assert any(completion.stats.accepted for completion in together)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        alone = decoder.plain().generate([prompt], max_tokens=20, sampling=sampling)[0]
        assert (completion.text, completion.tokens) == (alone.text, alone.tokens)
        streamed = "".join(piece.text for piece in decoder.stream(prompt, max_tokens=20, sampling=sampling))
        assert streamed == completion.text


def test_stats_add_up(folder: Path) -> None:
    decoder = load(folder, "early-exit", threshold=0.0, max_draft=3)
    done = decoder.generate(PROMPTS, max_tokens=15)
    stats = kangaroo.Stats.total(c.stats for c in done)
    assert all(c.stats.emitted == len(c.tokens) for c in done)
    assert stats.emitted == sum(len(c.tokens) for c in done) == sum(stats.lengths)
    assert stats.rounds == len(stats.lengths) == len(stats.drafts)
    assert stats.accepted == sum(sum(c.drafted) for c in done) <= stats.drafted == sum(stats.drafts)
    assert stats.compression_rate == stats.emitted / stats.rounds
    assert stats.tokens_per_second > 0


def test_a_stop_string_ends_the_row_and_is_not_shown(folder: Path) -> None:
    decoder = load(folder, "early-exit", threshold=0.0)
    whole = decoder.generate(["Where would"], max_tokens=30)[0]
    stop = whole.text[5:8]
    cut = decoder.generate(["Where would"], max_tokens=30, stop=[stop])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < len(whole.tokens)
    streamed = decoder.stream("Where would", max_tokens=30, stop=[stop])
    assert "".join(piece.text for piece in streamed) == cut.text


def test_the_end_of_sequence_token_is_emitted_but_is_not_text(folder: Path) -> None:
    decoder = load(folder, "early-exit")
    eos = decoder.eos[0]
    forced = decoder.generate(["The"], max_tokens=9, sampling=Sampling(logit_bias={eos: 1e9}))[0]
    assert (forced.tokens, forced.text, forced.finish_reason) == ([eos], "", "stop")


def test_errors_come_before_the_first_piece(folder: Path) -> None:
    decoder = load(folder, "none")
    with pytest.raises(ConfigError, match="max_tokens"):
        decoder.stream("The", max_tokens=0)
    with pytest.raises(DataError, match="empty"):
        decoder.generate([[{"role": "user", "content": "x"}], ""])
    with pytest.raises(DataError, match="context"):
        decoder.generate(["The " * 1100])
    with pytest.raises(DataError, match="no prompts"):
        decoder.generate([])
    with pytest.raises(DataError, match=r"generate\(\[prompt\]\)"):
        decoder.generate("The")


def test_user_mistakes_at_loading_name_the_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kangaroo-tree"):
        kangaroo.load(folder / "target", drafter="kangroo")
    with pytest.raises(ConfigError, match="kangaroo train"):
        kangaroo.load(folder / "target")
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        load(folder, treshold=0.5)
    with pytest.raises(ConfigError, match="exit layer"):
        load(folder, "early-exit", exit_layer=4)
    with pytest.raises(AdapterError, match="no adapter"):
        kangaroo.load(folder / "target", adapter=tmp_path)
    with pytest.raises(ModelError, match="cannot load"):
        kangaroo.load(tmp_path / "nothing")
    other = save_chat_model(tmp_path, seed=1)
    with pytest.raises(AdapterError, match="another target"):
        kangaroo.load(folder / "target", adapter=other / "adapter")


@pytest.mark.parametrize("batch", [1, 2])
def test_the_drop_in_equals_transformers_greedy_generation(folder: Path, batch: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target", padding_side="left")
    inputs = tokenizer(PROMPTS[:batch], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    wanted = model.generate(**inputs, **settings)
    drop_in = kangaroo.custom_generate(adapter=folder / "adapter", threshold=0.0)
    assert torch.equal(model.generate(**inputs, **settings, custom_generate=drop_in), wanted)
    penalised = {**settings, "repetition_penalty": 1.3}
    assert torch.equal(
        model.generate(**inputs, **penalised, custom_generate=drop_in), model.generate(**inputs, **penalised)
    )


def test_the_drop_in_samples_reproducibly_and_refuses_what_it_cannot_honour(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float64)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    drop_in = kangaroo.custom_generate(adapter=folder / "adapter", seed=3)
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": 20}
    first, second = (model.generate(**inputs, **settings, custom_generate=drop_in) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="NoRepeatNGram"):
        model.generate(**inputs, max_new_tokens=4, no_repeat_ngram_size=2, custom_generate=drop_in)


def test_a_target_spread_over_devices_writes_the_same_text(folder: Path, tmp_path: Path) -> None:
    places = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = AutoModelForCausalLM.from_pretrained(
        folder / "target", device_map=places, offload_folder=tmp_path, dtype=torch.float64
    )
    decoder = kangaroo.load(spread, adapter=folder / "adapter", threshold=0.05)
    assert decoder.target.hides_weights
    got = decoder.generate(PROMPTS, max_tokens=20)
    assert any(c.stats.accepted for c in got)
    assert [c.tokens for c in got] == [c.tokens for c in load(folder, "none").generate(PROMPTS, max_tokens=20)]
