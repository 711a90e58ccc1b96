"""The official client, against a live server with a tiny model: every answer is the one the Decoder gives."""

import asyncio
import json
import math
import runpy
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live import CLIENT, Live, engine_of, serving
from prometheus_client.parser import text_string_to_metric_families

from chat_model import save_chat_model
from kangaroo.decoder import Decoder, load
from kangaroo.logprobs import Logprobs
from kangaroo.sampling import Sampling
from kangaroo.scheduler import Scheduler, Step

HELLO = [{"role": "user", "content": "I need 3 tickets to Oakland."}]
OTHERS = [[{"role": "user", "content": text}] for text in ("Where?", "naïve café", "The answer", "eat")]
BANNED = {str(token): -100.0 for token in range(5, 60)}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = save_chat_model(tmp_path_factory.mktemp("chat"))
    return load(folder / "target", adapter=folder / "adapter", dtype="float64", threshold=0.0, max_draft=3)


@pytest.fixture(scope="module")
def live(decoder: Decoder) -> Iterator[Live]:
    with serving(engine_of(decoder, rows=4)) as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0}, {}),
    "hot": ({"temperature": 1.3, "seed": 5}, {}),
    "default temperature": ({"seed": 9}, {}),
    "nucleus": ({"seed": 1, "top_p": 0.7}, {}),
    "top-k and min-p": ({"seed": 2}, {"top_k": 20, "min_p": 0.02}),
    "penalties": ({"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5}, {"repetition_penalty": 1.2}),
    "bias": ({"seed": 3, "logit_bias": BANNED}, {}),
    "least length": ({"temperature": 0}, {"min_tokens": 20}),
    "no end": ({"seed": 4}, {"ignore_eos": True}),
    "stop token": ({"seed": 4}, {"stop_token_ids": list(range(40, 90))}),
    "stop": ({"seed": 6, "stop": ["e", "an", "xyz"]}, {}),
}


def alone(decoder: Decoder, messages: Any, given: dict[str, Any], extra: dict[str, Any], **more: Any) -> Any:
    """The same from the library."""
    asked = {"temperature": 1.0} | given | extra
    own = ("stop", "min_tokens", "ignore_eos", "stop_token_ids")
    others = {name: asked.pop(name) for name in own if name in asked}
    bias = {int(token): value for token, value in asked.pop("logit_bias", {}).items()}
    sampling = Sampling(**asked, logit_bias=bias)
    return decoder.plain().generate([messages], sampling=sampling, **others, **({"max_tokens": 24} | more))


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_the_decoders_own(client: openai.OpenAI, decoder: Decoder, case: str) -> None:
    given, extra = CASES[case]
    (wanted,) = alone(decoder, HELLO, given, extra)
    for enabled in (True, False):
        extension = extra | {"speculation": {"enabled": enabled}}
        create = client.chat.completions.create
        found = create(model="tiny", messages=HELLO, max_tokens=24, extra_body=extension, **given)
        choice = found.choices[0]
        assert (choice.message.content, choice.finish_reason) == (wanted.text, wanted.finish_reason)
        usage = found.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.tokens))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        status = found.model_extra["speculation"]["status"]
        assert status in (("on", "drafts do not pay at this load") if enabled else ("asked not to",))
    options = {"include_usage": True}
    chunks = list(
        create(
            model="tiny", messages=HELLO, max_tokens=24, stream=True, stream_options=options, extra_body=extra, **given
        )
    )
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == wanted.text
    assert [part.finish_reason for part in parts if part.finish_reason] == [wanted.finish_reason]
    assert chunks[-1].usage.completion_tokens == len(wanted.tokens)
    assert not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_at_once_from_asyncio_each_as_if_alone(live: Live, decoder: Decoder) -> None:
    async def ask(index: int, client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=OTHERS[index % 4], max_tokens=10 + index, seed=index, temperature=0.9, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(index, client) for index in range(12)))

    for index, text in enumerate(asyncio.run(ask_all())):
        (wanted,) = alone(decoder, OTHERS[index % 4], {"temperature": 0.9, "seed": index}, {}, max_tokens=10 + index)
        assert text == wanted.text


def test_several_answers_to_one_prompt(client: openai.OpenAI, decoder: Decoder) -> None:
    wanted = [each.text for each in alone(decoder, HELLO, {"seed": 8}, {}, n=3)]
    create, asked = client.chat.completions.create, {"model": "tiny", "messages": HELLO, "seed": 8, "n": 3}
    found = create(**asked, max_tokens=24)
    assert [choice.message.content for choice in found.choices] == wanted
    assert len(set(wanted)) == 3
    assert found.usage.prompt_tokens == alone(decoder, HELLO, {}, {})[0].prompt_tokens
    texts = [""] * 3
    for chunk in create(**asked, max_tokens=24, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == wanted


def test_completions_of_texts_and_of_token_ids(client: openai.OpenAI, decoder: Decoder) -> None:
    ids = decoder.tokenizer.encode("The answer")
    for prompt, prompts in (
        ("The answer", ["The answer"]),
        (["The answer", "Where", "Where"], ["The answer", "Where", "Where"]),
        (ids, [ids]),
        ([ids, ids[:1]], [ids, ids[:1]]),
    ):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=3, n=2)
        wanted = decoder.generate(prompts, sampling=Sampling(temperature=1.0, seed=3), max_tokens=9, n=2)
        assert [choice.text for choice in found.choices] == [each.text for each in wanted]
        assert [choice.index for choice in found.choices] == list(range(len(wanted)))
        assert found.usage.prompt_tokens == sum(each.prompt_tokens for each in wanted[::2])
    assert client.completions.create(model="tiny", prompt="eat").usage.completion_tokens <= 16


def test_log_probabilities_are_the_models_own(client: openai.OpenAI, decoder: Decoder) -> None:
    (wanted,) = alone(decoder, HELLO, {"seed": 5}, {}, logprobs=Logprobs(3, raw=True))
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=5, max_tokens=24, logprobs=True, top_logprobs=3
    )
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=5, max_tokens=24, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [
        each for chunk in stream for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content
    ]
    for content in (chat.choices[0].logprobs.content, streamed):
        assert [each.logprob for each in content] == pytest.approx([each.logprob for each in wanted.logprobs])
        for each, own in zip(content, wanted.logprobs, strict=True):
            assert [top.logprob for top in each.top_logprobs] == pytest.approx([log for _, log in own.top])
            assert each.bytes is None or bytes(each.bytes).decode() == each.token
    prompt = decoder.tokenizer.encode(HELLO)
    text = client.completions.create(model="tiny", prompt=prompt, seed=5, max_tokens=24, logprobs=3).choices[0]
    assert text.logprobs.token_logprobs == pytest.approx([each.logprob for each in wanted.logprobs])
    assert len(text.logprobs.tokens) == len(text.logprobs.text_offset) == len(wanted.tokens)
    assert all(len(tops) <= 3 for tops in text.logprobs.top_logprobs)


def test_what_speculation_has_done_is_said_on_request(decoder: Decoder) -> None:
    wants = {"speculation": {"statistics": True, "tokens": True}}
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 40} | wants
    # An engine that has not run yet drafts, whatever it may find to pay.
    with serving(engine_of(decoder, rows=1)) as live:
        post = live.url + "/v1/chat/completions"
        found = CLIENT.post(post, json=asked).json()
        check_facts(found["speculation"], found["choices"], found["usage"]["completion_tokens"], decoder.drafter)
        assert 0 < found["speculation"]["accepted"] < found["speculation"]["drafted"]
        content = found["choices"][0]["message"]["content"]
        assert "".join(each["text"] for each in found["choices"][0]["tokens"]) == content
        for options in ({}, {"stream_options": {"include_usage": True}}):
            raw = CLIENT.post(post, json=asked | {"stream": True} | options).text.split("\n\n")
            chunks = [json.loads(event[6:]) for event in raw if event.startswith("data: {")]
            choices = [choice for chunk in chunks for choice in chunk["choices"] if "tokens" in choice]
            check_facts(chunks[-1]["speculation"], choices, found["usage"]["completion_tokens"], decoder.drafter)
            assert "".join(each["text"] for choice in choices for each in choice["tokens"]) == content


def check_facts(facts: dict[str, Any], choices: list[dict[str, Any]], tokens: int, drafter: str) -> None:
    assert facts["drafter"] == drafter
    assert facts["emitted"] == tokens == sum(len(choice["tokens"]) for choice in choices)
    assert facts["accepted"] == sum(each["drafted"] for choice in choices for each in choice["tokens"])
    assert sum(facts["histogram"]) == facts["rounds"] > 0
    assert sum(rounds * (place + 1) for place, rounds in enumerate(facts["histogram"])) == facts["emitted"]
    assert facts["acceptance_rate"] == (facts["accepted"] / facts["drafted"] if facts["drafted"] else 0)
    assert facts["mean_acceptance_length"] == facts["emitted"] / facts["rounds"]


def test_errors_are_those_the_client_knows(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2000 tokens.*1024") as caught:
        client.completions.create(model="tiny", prompt=[5] * 2000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=4, extra_body={"min_tokens": 5})
    assert caught.value.param == "min_tokens"
    for wrong in ({"prompt": [400]}, {"prompt": "x", "max_tokens": 0}, {"prompt": [-1]}, {"prompt": ""}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "tiny"} | wrong)
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert client.models.list().data[0].id == "tiny"


def test_a_conversation_that_the_template_refuses_is_refused(
    live: Live, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.tokenizer.wrapped, "chat_template", "{{ raise_exception('roles must alternate') }}")
    answer = CLIENT.post(live.url + "/v1/chat/completions", json={"messages": HELLO})
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]


def test_what_a_row_cannot_hold_is_refused_or_cut(decoder: Decoder) -> None:
    with serving(engine_of(decoder, rows=2, capacity=40)) as live:
        post = live.url + "/v1/completions"
        cut = CLIENT.post(post, json={"prompt": [7] * 30, "max_tokens": 99, "ignore_eos": True}).json()
        assert cut["usage"]["completion_tokens"] == 10
        assert cut["choices"][0]["finish_reason"] == "length"
        answer = CLIENT.post(post, json={"prompt": [7] * 40})
        assert answer.status_code == 400
        assert "40 tokens" in answer.json()["error"]["message"]


def test_a_client_that_is_killed_frees_its_row(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Scheduler.step

    def slow(self: Scheduler) -> Step:
        time.sleep(0.05)  # of the answer, 250 rounds at least, most is left when its client is killed
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow)
    code = """
        import httpx, sys
        body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", sys.argv[1] + "/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
            print("reading", flush=True)
            for _ in answer.iter_bytes(): pass
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), live.url], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"reading\n"
    status = live.service.status()
    assert status is not None
    assert status.running == 1
    child.kill()
    child.wait()
    live.wait_until(lambda: live.service.status().running == 0)
    child.stdout.close()


def test_metrics_add_up(decoder: Decoder) -> None:
    with serving(engine_of(decoder, rows=2)) as live:
        compare_metrics(live)


def compare_metrics(live: Live) -> None:
    def read() -> dict[str, float]:
        text = CLIENT.get(live.url + "/metrics").text
        families = text_string_to_metric_families(text)
        found: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + (0 if "le" in sample.labels else sample.value)
        return found

    before = read()
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 30, "speculation": {"statistics": True}}
    answer = CLIENT.post(live.url + "/v1/chat/completions", json=body).json()
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    facts, usage = answer["speculation"], answer["usage"]
    prefix = "kangaroo_spec_decode_"
    assert grown[f"{prefix}num_drafts_total"] == facts["rounds"]
    assert grown[f"{prefix}num_draft_tokens_total"] == facts["drafted"]
    assert grown[f"{prefix}num_accepted_tokens_total"] == facts["accepted"]
    assert grown[f"{prefix}num_accepted_tokens_per_pos_total"] == facts["accepted"]
    assert grown[f"{prefix}draft_stops_total"] == facts["rounds"]
    assert grown[f"{prefix}draft_seconds_total"] > 0
    assert grown[f"{prefix}verify_seconds_total"] > 0
    assert grown["kangaroo_generation_tokens_total"] == usage["completion_tokens"]
    assert grown["kangaroo_prompt_tokens_total"] == usage["prompt_tokens"]
    assert grown["kangaroo_time_to_first_token_seconds_count"] == 1
    assert grown["kangaroo_inter_token_latency_seconds_count"] == usage["completion_tokens"] - 1
    assert grown["kangaroo_e2e_request_latency_seconds_count"] == 1
    assert grown["kangaroo_request_success_total"] == 1
    assert 0 < grown["kangaroo_time_to_first_token_seconds_sum"] <= grown["kangaroo_e2e_request_latency_seconds_sum"]
    assert after["kangaroo_num_requests_running"] == after["kangaroo_num_requests_waiting"] == 0
    assert all(math.isfinite(value) for value in after.values())


def test_the_example_runs(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "openai_client.py"
    monkeypatch.setattr(sys, "argv", ["openai_client.py", live.url + "/v1"])
    runpy.run_path(str(example), run_name="__main__")
    assert "'histogram'" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["openai_client.py", "http://127.0.0.1:9/v1"])
    with pytest.raises(SystemExit, match="kangaroo serve"):
        runpy.run_path(str(example), run_name="__main__")


def test_a_streams_events_are_well_formed(live: Live) -> None:
    body = {"messages": OTHERS[1], "stream": True, "seed": 1, "max_tokens": 30}
    with CLIENT.stream("POST", live.url + "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(answer.iter_raw())
    blocks = raw.decode("ascii").split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(block.removeprefix("data: "))["object"] == "chat.completion.chunk" for block in blocks[:-2])
