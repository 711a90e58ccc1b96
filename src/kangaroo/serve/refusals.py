"""What the server refuses, in the shape that OpenAI's clients read: status, message, type, parameter and code."""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from kangaroo.errors import CapacityError, EngineClosed, KangarooError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable_error",
}


class Refusal(Exception):
    """An answer that is an error. `param` names the field at fault, `code` the kind of fault where OpenAI has one."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: float | None = None
    ):
        """`retry`: after so many seconds the same request may succeed."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry is None else {"Retry-After": str(max(1, math.ceil(retry)))}

    @property
    def body(self) -> dict[str, Any]:
        """The object `{"error": ...}`."""
        error = {"message": str(self), "type": TYPES[self.status], "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status, {**self.headers, **(headers or {})})


def refused(error: KangarooError, fields: Mapping[str, str]) -> Refusal:
    """An error in a request's arguments as a refusal; its messages begin with the setting, if one is at fault.

    `fields` are those that settings are given in.
    """
    first = str(error).split(maxsplit=1)[0] if str(error) else ""
    return Refusal(400, str(error), fields.get(first))


def failed(error: KangarooError) -> Refusal:
    """An error that came while an answer was being written."""
    if isinstance(error, EngineClosed):
        return Refusal(503, "the server is shutting down: the answer was broken off", code="draining")
    return Refusal(503 if isinstance(error, CapacityError) else 400, str(error))
