"""The drop-in for transformers beyond greedy texts: streamers, outputs, and models that are let go of."""

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer

import kangaroo
from chat_model import save_chat_model
from kangaroo.errors import ConfigError

SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "target")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float64)


def drop_in(folder: Path, **settings: Any) -> Any:
    return kangaroo.custom_generate(adapter=folder / "adapter", threshold=0.0, **settings)


def test_a_model_that_is_let_go_of_is_freed_while_the_function_lives(folder: Path) -> None:
    function, models = drop_in(folder), []
    for _ in range(2):
        model = load(folder)
        models.append(weakref.ref(model))
        model.generate(torch.tensor([[5, 6, 7]]), **SETTINGS, custom_generate=function)
        del model
    gc.collect()
    assert [model() for model in models] == [None, None]


def test_what_was_made_for_a_model_is_made_once_and_freed_with_the_function(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[kangaroo.Target]] = []
    honest = kangaroo.Target.__init__

    def noted(self: kangaroo.Target, model: Any) -> None:
        made.append(weakref.ref(self))
        honest(self, model)

    monkeypatch.setattr(kangaroo.Target, "__init__", noted)
    model, function = load(folder), drop_in(folder)
    for _ in range(3):
        model.generate(torch.tensor([[5, 6, 7]]), **SETTINGS, custom_generate=function)
    assert len(made) == 1
    del function
    gc.collect()
    assert made[0]() is None


def test_a_copy_of_a_model_does_not_decode_with_the_first_ones_weights(folder: Path) -> None:
    model, function = load(folder), drop_in(folder, allow_other_target=True)
    inputs = torch.tensor([[5, 6, 7]])
    model.generate(inputs, **SETTINGS, custom_generate=function)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    want = other.generate(inputs, **SETTINGS)
    assert not torch.equal(want, model.generate(inputs, **SETTINGS))
    assert torch.equal(other.generate(inputs, **SETTINGS, custom_generate=function), want)


class Noted:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_then_every_token_then_the_end(folder: Path) -> None:
    model, streamer, inputs = load(folder), Noted(), torch.tensor([[5, 6, 7]])
    function = drop_in(folder, streamer=streamer)
    text = model.generate(inputs, **SETTINGS, custom_generate=function)
    assert torch.equal(streamer.given[0], inputs)
    assert torch.cat(streamer.given[1:]).tolist() == text[0, 3:].tolist()
    assert all(token.shape == (1,) for token in streamer.given[1:])
    assert streamer.ended == 1
    with pytest.raises(ConfigError, match="one prompt at a time"):
        model.generate(inputs.expand(2, -1), **SETTINGS, custom_generate=function)
    assert streamer.ended == 2, "whoever reads would wait for ever"


def test_transformers_own_streamers(folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = load(folder), tokenizer("Where would", return_tensors="pt")
    plain = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **SETTINGS, streamer=plain)
    want = capsys.readouterr().out
    model.generate(**inputs, **SETTINGS, custom_generate=drop_in(folder, streamer=plain))
    assert capsys.readouterr().out == want
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    function = drop_in(folder, streamer=iterator)
    writer = threading.Thread(target=model.generate, kwargs={**inputs, **SETTINGS, "custom_generate": function})
    writer.start()
    text = "".join(iterator)
    writer.join()
    assert text == want.removesuffix("\n")


def test_outputs_may_be_asked_for_as_a_dict(folder: Path) -> None:
    model, inputs = load(folder), torch.tensor([[5, 6, 7]])
    want = model.generate(inputs, **SETTINGS)
    got = model.generate(inputs, **SETTINGS, return_dict_in_generate=True, custom_generate=drop_in(folder))
    assert torch.equal(got.sequences, want)
    with pytest.raises(ConfigError, match="output_scores"):
        model.generate(
            inputs, **SETTINGS, return_dict_in_generate=True, output_scores=True, custom_generate=drop_in(folder)
        )


def test_min_new_tokens_are_those_of_transformers(folder: Path) -> None:
    model, inputs = load(folder), torch.tensor([[5, 6, 7]])
    ends = model.generate(inputs, **SETTINGS)[0, 4:7].tolist()
    for least in ({"min_new_tokens": 10}, {"min_length": 13}):
        settings = {**SETTINGS, "eos_token_id": ends, **least}
        want = model.generate(inputs, **settings)
        assert want.shape[1] >= 13
        assert torch.equal(model.generate(inputs, **settings, custom_generate=drop_in(folder)), want)


def test_a_config_or_a_drafter_of_ones_own_will_do(folder: Path) -> None:
    model, inputs = load(folder), torch.tensor([[5, 6, 7]])
    want = model.generate(inputs, **SETTINGS)
    for drafter, settings in ((kangaroo.ChainConfig(threshold=0.0), {"exit_layer": 1}), ("prompt-lookup", {})):
        function = kangaroo.custom_generate(drafter=drafter, **settings)  # type: ignore[arg-type]
        assert torch.equal(model.generate(inputs, **SETTINGS, custom_generate=function), want)
    with pytest.raises(ConfigError, match="drafter must be"):
        kangaroo.custom_generate(drafter="kangroo")
