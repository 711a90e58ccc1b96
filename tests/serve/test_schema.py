"""Requests made from the server's own schema: each is answered or refused, none breaks anything."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from live import Live, serving
from schemathesis.checks import not_a_server_error
from stand_in import ScriptedEngine

from kangaroo.serve.app import make_app
from kangaroo.serve.service import Service

schema = schemathesis.openapi.from_dict(make_app(Service(lambda: None, "tiny")).openapi())


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(lambda: ScriptedEngine(["a", "b"])) as found:
        yield found


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_schema_holds(case: schemathesis.Case, live: Live) -> None:
    answer = case.call(base_url=live.url)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
