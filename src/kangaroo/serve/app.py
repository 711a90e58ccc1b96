"""The routes: an application that any ASGI server runs, and that loads its model when it starts."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from kangaroo.completion import Piece
from kangaroo.errors import KangarooError
from kangaroo.serve import browser
from kangaroo.serve.events import COMMENT, DONE, KEEP_ALIVE, STALLED, ClientGone, EventStream, merged, unless_gone
from kangaroo.serve.guard import Guard
from kangaroo.serve.metrics import Clock, Metrics
from kangaroo.serve.protocol import Asked, ChatRequest, TextRequest, fields_of, parse, to_call
from kangaroo.serve.refusals import Refusal, failed
from kangaroo.serve.replies import Reply, speculation, usage
from kangaroo.serve.service import Answers, Service

LARGEST_BODY = 4 << 20
DISCARDED = 64 << 20
"""Bytes beyond the largest body that are read and dropped, so that the client hears why it was refused."""
logger = logging.getLogger("kangaroo.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may use the server, and how."""

    key: str | None = None
    hosts: Sequence[str] | None = None
    """Names that the server goes by; None for any."""
    origins: Sequence[str] = ()
    """Origins of pages, beside its own, that may use it."""
    largest_body: int = LARGEST_BODY
    """Bytes."""
    keep_alive: float = field(default=KEEP_ALIVE)
    """Seconds of silence after which a stream carries a comment."""


def make_app(service: Service, access: Access | None = None, *, drain: float = 0.0) -> FastAPI:
    """The application; its model loads when it starts, and requests have `drain` seconds to finish when it stops."""
    access = access or Access()
    routes = _Routes(service, Metrics(service.status), access)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.drain(drain)

    app = FastAPI(
        title="Kangaroo",
        lifespan=life,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        middleware=[
            *([_cors(access.origins)] if access.origins else []),
            Middleware(Guard, key=access.key, hosts=access.hosts, origins=access.origins),
        ],
        exception_handlers={
            Refusal: routes.refuse,
            HTTPException: routes.refuse_path,
            ClientGone: routes.gone,
            Exception: routes.broken,
        },
    )
    for path, endpoint, kind in (
        ("/v1/chat/completions", routes.chat, ChatRequest),
        ("/v1/completions", routes.complete, TextRequest),
    ):
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        body = {"requestBody": {"content": content, "required": True}}
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=body, response_model=None)
    for path, getter in (
        ("/v1/models", routes.models),
        ("/v1/models/{name:path}", routes.model),
        ("/health", routes.health),
        ("/metrics", routes.metrics),
    ):
        app.add_api_route(path, getter, methods=["GET"], response_model=None)
    for path, file in browser.FILES.items():
        app.add_route(path, routes.page(file), methods=["GET"], include_in_schema=False)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _cors(origins: Sequence[str]) -> Middleware:
    return Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])


def _describe(app: FastAPI) -> dict[str, Any]:
    """The schema of the interface; bodies are read by hand, so theirs are added."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema(
        [(ChatRequest, "validation"), (TextRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    found.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
    return found


class _Routes:
    def __init__(self, service: Service, metrics: Metrics, access: Access):
        self._service, self._metrics, self._access, self._created = service, metrics, access, int(time.time())

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        return await self._answer(request, TextRequest)

    async def _answer(self, request: Request, kind: type[Asked]) -> Response:
        clock = Clock(self._metrics)
        asked = parse(kind, await read_body(request, self._access.largest_body))
        engine = self._service.engine
        if asked.model not in (None, self._service.name):
            raise self._no_model(str(asked.model), "model")
        answers = await unless_gone(request.receive, self._service.submit(to_call(asked), fields_of(kind)))
        self._metrics.prompt_tokens.inc(sum(answers.prompt_tokens))
        decoder = engine.decoder
        fingerprint = f"fp_{decoder.target.fingerprint.rpartition('-')[2]}"
        reply = Reply(asked, self._service.name, fingerprint, decoder.tokenizer)
        headers = {"X-Request-Id": reply.id}
        drafter = engine.drafters[answers.tickets[0].drafter]
        running = _Running(answers, reply, clock, self._metrics, drafter)
        if asked.stream:
            return EventStream(running.events(self._access.keep_alive), headers)
        return JSONResponse(await unless_gone(request.receive, running.whole()), headers=headers)

    async def models(self) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """The model of this name."""
        if name != self._service.name:
            raise self._no_model(name)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        engine = self._service.engine
        return {
            "id": self._service.name,
            "object": "model",
            "created": self._created,
            "owned_by": "kangaroo",
            "max_model_len": engine.capacity,
            "drafters": [{"id": name, "description": drafter} for name, drafter in engine.drafters.items()],
        }

    def _no_model(self, name: str, param: str | None = None) -> Refusal:
        message = f"there is no model {name[:100]!r} here, only {self._service.name!r}"
        return Refusal(404, message, param, "model_not_found")

    async def health(self) -> Response:
        """200 when requests can be answered; else 503, with the state."""
        state = self._service.state
        return JSONResponse({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    async def metrics(self) -> Response:
        """Counts and latencies, for Prometheus."""
        text = await asyncio.to_thread(generate_latest, self._metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    def page(self, file: str) -> Callable[[Request], Awaitable[Response]]:
        """Serves a file of the page for browsers."""

        async def serve(_: Request) -> Response:
            return browser.page(file)

        return serve

    async def refuse(self, _: Request, error: Exception) -> Response:
        """A refusal as a response."""
        assert isinstance(error, Refusal)
        self._metrics.refused.labels(str(error.status)).inc()
        return error.response()

    async def refuse_path(self, request: Request, error: Exception) -> Response:
        """A path or a method that there is not."""
        assert isinstance(error, HTTPException)
        what = f"{request.method[:20]} {request.url.path[:100]}"
        reason = {404: "there is no such path", 405: "this path does not take this method"}.get(error.status_code)
        refusal = Refusal(error.status_code, f"{reason or error.detail}: {what}")
        self._metrics.refused.labels(str(error.status_code)).inc()
        return refusal.response(error.headers)

    async def gone(self, _: Request, __: Exception) -> Response:
        """Nobody will read this."""
        self._metrics.cancelled.inc()
        return Response(status_code=499)

    async def broken(self, _: Request, __: Exception) -> Response:
        """A mistake of ours: its traceback goes to the server's log."""
        return Refusal(500, _BROKEN).response()


_BROKEN = "something went wrong in the server; its log has more"


async def read_body(request: Request, largest: int) -> bytes:
    """The body, no more than `largest` bytes of it in memory. Raises Refusal for a larger one."""
    body, size, more = bytearray(), 0, True
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > largest
    refusal = Refusal(413, f"the body is larger than {largest} bytes", code="body_too_large")
    if too_large and (request.headers.get("expect") or int(declared) > DISCARDED):
        raise refusal
    while more:
        try:
            async with asyncio.timeout(STALLED):
                message = await request.receive()
        except TimeoutError:
            raise Refusal(408, f"nothing of the body has come for {STALLED:.0f} seconds") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        too_large = too_large or size > largest
        if too_large:
            body.clear()
        else:
            body += chunk
        if size > DISCARDED:
            break
    if too_large:
        raise refusal
    return bytes(body)


class _Running:
    """A request being answered: whole, or as events."""

    def __init__(self, answers: Answers, reply: Reply, clock: Clock, metrics: Metrics, drafter: str):
        self._answers, self._reply, self._clock = answers, reply, clock
        self._metrics, self._drafter = metrics, drafter

    async def whole(self) -> dict[str, Any]:
        """The response."""
        pieces: list[list[Piece]] = [[] for _ in self._answers.tickets]
        try:
            async with aclosing(merged(self._answers.tickets, 3600)) as found:
                async for item in found:
                    if item is not None:
                        self._saw(*item)
                        pieces[item[0]].append(item[1])
        except KangarooError as error:
            raise failed(error) from None
        self._finish()
        choices = [self._reply.choice(index, each) for index, each in enumerate(pieces)]
        return self._reply.wrap(choices, usage=self._usage(), speculation=self._speculation())

    async def events(self, keep_alive: float) -> AsyncGenerator[str, None]:
        """The response as server-sent events. What goes wrong now, after the status, is said in an event."""
        try:
            async with aclosing(self._chunks(keep_alive)) as chunks:
                async for chunk in chunks:
                    yield COMMENT if chunk is None else _event(chunk)
        except Refusal as error:
            yield _event(error.body)
        except KangarooError as error:
            yield _event(failed(error).body)
        except Exception:  # a mistake of ours, which the client must hear of as well
            logger.exception("an answer was broken off")
            yield _event(Refusal(500, _BROKEN).body)
        except (asyncio.CancelledError, GeneratorExit):  # the client has left, or does not read
            self._metrics.cancelled.inc()
            raise
        yield DONE

    async def _chunks(self, keep_alive: float) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Chunks of the response; None for a sign of life."""
        reply, left = self._reply, len(self._answers.tickets)
        more: dict[str, Any] = {"usage": None} if reply.asked.include_usage else {}
        async with aclosing(merged(self._answers.tickets, keep_alive)) as found:
            if reply.chat:
                for index in range(left):
                    yield reply.wrap([reply.opening(index)], **more)
            async for item in found:
                if item is None:
                    yield None
                    continue
                index, piece = item
                self._saw(index, piece)
                left -= piece.finish_reason is not None
                choice = reply.part(index, piece)
                if choice is not None:
                    last = {} if left or reply.asked.include_usage else {"speculation": self._speculation()}
                    yield reply.wrap([choice], **more, **last)
        self._finish()
        if reply.asked.include_usage:
            yield reply.wrap([], usage=self._usage(), speculation=self._speculation())

    def _saw(self, index: int, piece: Piece) -> None:
        self._clock.token(index)
        if piece.finish_reason is not None:
            self._metrics.finished.labels(piece.finish_reason).inc()

    def _finish(self) -> None:
        assert all(ticket.completion for ticket in self._answers.tickets), "only this request cancels its tickets"
        self._clock.end()

    def _usage(self) -> dict[str, Any]:
        return usage(self._answers.tickets, self._answers.prompt_tokens)

    def _speculation(self) -> dict[str, Any]:
        wanted = self._reply.asked.wants.statistics
        return speculation(self._answers.tickets, self._drafter, statistics=wanted)


def _event(content: dict[str, Any]) -> str:
    # In ASCII: some clients take rare line separators of Unicode for the end of an event's line.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
