"""Bodies: what is honoured, what is refused and by which name, and that nothing at all is answered with a 500."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import CLIENT, Live, serving
from stand_in import ScriptedEngine

from kangaroo.errors import ConfigError
from kangaroo.serve.app import Access
from kangaroo.serve.protocol import REFUSED, ChatRequest, TextRequest, parse, to_call
from kangaroo.serve.refusals import Refusal

HELLO = [{"role": "user", "content": "Hello"}]
PATHS = {"/v1/chat/completions": {"messages": HELLO}, "/v1/completions": {"prompt": "Hello"}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(lambda: ScriptedEngine(["a", "b"]), Access(largest_body=100_000)) as found:
        yield found


def refusal(body: Any, kind: Any = ChatRequest) -> Refusal:
    with pytest.raises(Refusal) as caught:
        to_call(parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode()))
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_k": -2}, "top_k", "at least 1"),
        ({"min_p": 2}, "min_p", "[0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
        ({"seed": 2**70}, "seed", "beyond"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 129}, "n", "128"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "integer"),
        ({"logit_bias": {"1": 1e20}}, "logit_bias", "1e+12"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "1024"),
        ({"stop": [1]}, "stop", "string"),
        ({"stop": ["x"] * 65}, "stop", "64"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids.0", "integer"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0..20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"speculation": {"enabled": 1}}, "speculation.enabled", "boolean"),
        ({"speculation": {"enable": False}}, "speculation.enable", "not permitted"),
        ({"speculation": {"x" * 5000: 1}}, "speculation." + "x" * 64, "not permitted"),
        ({"speculation": {"drafter": 5}}, "speculation.drafter", "string"),
        ({"speculation": {"max_draft": 0}}, "speculation.max_draft", "at least 1"),
        ({"speculation": {"max_draft": 1.5}}, "speculation.max_draft", "integer"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "tool"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name", "not supported"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls", "not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "image_url",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(changes: dict[str, Any], param: str, said: str) -> None:
    found = refusal({"messages": HELLO} | changes)
    assert found.param == param
    assert said in str(found)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_and_its_neutral_values_are_not(name: str) -> None:
    for kind, body in ((ChatRequest, {"messages": HELLO}), (TextRequest, {"prompt": "x"})):
        found = refusal(body | {name: {"something": 1}}, kind)
        assert found.param == name
        assert name in str(found)
        assert found.code == "unsupported_parameter"
        for neutral in (*REFUSED[name], None):
            to_call(parse(kind, json.dumps(body | {name: neutral}).encode()))


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{", b"\xff", b'{"messages": "\\ud800"}', b"[" * 100_000, b'{"n": NaN}', b'{"n": 1e999}'],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert len(str(refusal(body))) < 300


def test_unknown_fields_and_nulls_are_ignored() -> None:
    every = dict.fromkeys(set(ChatRequest.model_fields) - {"messages"})
    call = to_call(parse(ChatRequest, json.dumps({"messages": HELLO, **every, "user": "me", "foo": [1]}).encode()))
    assert call.limit is None
    assert call.n == 1
    assert call.sampling.temperature == 1.0
    assert to_call(parse(TextRequest, b'{"prompt": "x"}')).limit == 16


def test_without_a_seed_no_two_requests_are_the_same_and_with_one_they_are() -> None:
    def seed(body: bytes) -> int:
        return to_call(parse(TextRequest, body)).sampling.seed

    assert seed(b'{"prompt": "x"}') != seed(b'{"prompt": "x"}')
    assert seed(b'{"prompt": "x", "seed": -7}') == -7


def test_parts_of_text_are_one_text_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, *HELLO]
    call = to_call(parse(ChatRequest, json.dumps({"messages": messages}).encode()))
    assert call.prompts == [[{"role": "system", "content": "ab"}, *HELLO]]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_of_every_kind(prompt: Any, wanted: list[Any]) -> None:
    assert to_call(parse(TextRequest, json.dumps({"prompt": prompt}).encode())).prompts == wanted


@pytest.mark.parametrize("prompt", [[], 5, None, [1, "x"], [True], [[1], 2], {"x": 1}, [1] * 50_000 + ["x"]])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    assert refusal({"prompt": prompt}, TextRequest).param == "prompt"


def test_paths_methods_and_models_that_there_are_not(live: Live) -> None:
    for method, path, status in (
        ("GET", "/v1/embeddings", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/models/org/name", 404),
    ):
        answer = CLIENT.request(method, live.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for path, body in PATHS.items():
        answer = CLIENT.post(live.url + path, json=body | {"model": "gpt-4"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert [card["id"] for card in CLIENT.get(live.url + "/v1/models").json()["data"]] == ["tiny"]
    assert CLIENT.get(live.url + "/v1/models/tiny").json()["id"] == "tiny"


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_never_held(live: Live, declared: bool) -> None:
    piece = b" " * (1 << 20)
    body: Any = piece * 50 if declared else (piece for _ in range(50))
    answer = CLIENT.post(live.url + "/v1/completions", content=body)
    assert answer.status_code == 413
    assert "100000" in answer.json()["error"]["message"]


def test_who_waits_for_leave_to_send_too_much_is_refused_first(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {live.url[7:]}\r\nExpect: 100-continue\r\n"
        client.sendall(f"{head}Content-Length: 50000000\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({*ChatRequest.model_fields, *TextRequest.model_fields, *REFUSED}))


@given(st.sampled_from(sorted(PATHS)), st.dictionaries(FIELDS, ANYTHING, max_size=3))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_is_more_than_refused(live: Live, path: str, changes: dict[str, Any]) -> None:
    content = json.dumps(PATHS[path] | changes).encode()
    answer = CLIENT.post(live.url + path, content=content)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(st.binary(max_size=60))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_are_more_than_refused(live: Live, content: bytes) -> None:
    assert CLIENT.post(live.url + "/v1/completions", content=content).status_code == 400


def test_drafters_are_listed_and_others_refused_by_name(live: Live) -> None:
    listed = CLIENT.get(live.url + "/v1/models").json()["data"][0]["drafters"]
    assert [each["id"] for each in listed] == ["scripted", "other"]
    for path, body in PATHS.items():
        for name, said in ((None, "scripted"), ("other", "other, max_draft=3")):
            wants = {"speculation": {"drafter": name, "statistics": True}}
            assert CLIENT.post(live.url + path, json=body | wants).json()["speculation"]["drafter"] == said
        answer = CLIENT.post(live.url + path, json=body | {"speculation": {"drafter": "medusa" * 100}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "speculation.drafter"
        assert "scripted, other" in answer.json()["error"]["message"]
        assert len(answer.json()["error"]["message"]) < 300


def test_an_error_of_the_engine_names_the_field(live: Live) -> None:
    def wrong() -> list[str]:
        raise ConfigError("min_tokens must be in 0..5, which is max_tokens, got 6")

    with serving(lambda: ScriptedEngine(wrong)) as other:
        error = CLIENT.post(other.url + "/v1/completions", json={"prompt": "x"}).json()["error"]
    assert error["param"] == "min_tokens"
    assert error["type"] == "invalid_request_error"
