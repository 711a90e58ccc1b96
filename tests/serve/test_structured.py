"""`response_format` and `structured_outputs`: answers in the form asked for, and refusals that name the field."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from live import CLIENT, Live, engine_of, serving

from chat_model import save_chat_model
from kangaroo.decoder import load
from kangaroo.load import Load

pytest.importorskip("llguidance", reason="needs the grammar extra")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"food": {"enum": ["tea", "toast"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["food", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "Where would you like to eat?"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = save_chat_model(tmp_path_factory.mktemp("model"))
    decoder = load(folder / "target", adapter=folder / "adapter", max_draft=4, threshold=0.0)
    with pytest.MonkeyPatch.context() as patch, serving(engine_of(decoder, rows=4)) as found:
        patch.setattr(Load, "drafts", lambda self, rows: True)  # whether it pays, on a busy machine or not
        yield found


def ask(live: Live, **fields: Any) -> Any:
    return CLIENT.post(live.url + "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 60, **fields})


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_a_schema_is_kept_to_drafted_or_not(live: Live, temperature: float) -> None:
    texts = []
    for enabled in (True, False):
        speculation = {"enabled": enabled, "statistics": True}
        answer = ask(live, response_format=FORMAT, temperature=temperature, seed=3, n=3, speculation=speculation).json()
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        texts.append([choice["message"]["content"] for choice in answer["choices"]])
        assert (answer["speculation"]["accepted"] > 0) is enabled
    assert texts[0] == texts[1]


def test_choices_expressions_and_text(live: Live) -> None:
    def said(**fields: Any) -> str:
        return str(ask(live, temperature=0, **fields).json()["choices"][0]["message"]["content"])

    assert said(structured_outputs={"choice": ["Oakland", "Boston"]}) in ("Oakland", "Boston")
    assert said(structured_outputs={"regex": "[ab]{4}"}, response_format={"type": "text"}).strip("ab") == ""
    assert said(response_format={"type": "text"}) == said(response_format=None) == said()


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "Unimplemented",
        ),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-ahead"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs", "both"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"guided_json": SCHEMA}, "guided_json", "not supported"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_by_name(live: Live, fields: dict[str, Any], param: str, named: str) -> None:
    answer = ask(live, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert named in answer.json()["error"]["message"]
