"""The HTTP application: OpenAI's /v1/chat/completions, /v1/completions and /v1/models, and /health and /metrics.

As many answers run at once as the engine has sequences, and others wait. If more than `waiting` wait, a request is
refused with 429 before it is looked at. When a client disconnects, its answer ends within one token. Without an API key
the server accepts only the host names of this machine. A web page can then not reach it through a host name of its own.
Knows no socket and no process.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from merino_edge import limits
from merino_edge.errors import MerinoError
from merino_edge.runtime.engine import Alone, Engine, SequenceGroup
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import Grammars
from merino_edge.runtime.server import requests
from merino_edge.runtime.server.answer import Answer
from merino_edge.runtime.server.metrics import Metrics
from merino_edge.runtime.server.refusals import LocalHosts, NoModel, refusal
from merino_edge.runtime.server.replies import PING, Reply, error_document, error_event
from merino_edge.runtime.server.worker import Busy, Worker
from merino_edge.runtime.shared_sessions import SharedSessions
from merino_edge.runtime.speculative.drafter import Proposer
from merino_edge.tokenizer import Tokenizer

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each event on at once
BODY_SECONDS = 30  # for a request to arrive whole, after its head
CLOSES = {"Connection": "close"}  # the rest of the request is not read
MAX_ARRIVING_BYTES = 64 * 2**20  # of all bodies that are arriving
KINDS: dict[str, type[requests.Request]] = {
    "/v1/chat/completions": requests.ChatRequest,
    "/v1/completions": requests.TextRequest,
}


class Service:
    """One engine behind HTTP. `name` is the model's name for clients."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        *,
        waiting: int,
        key: str | None,
        group: SequenceGroup | None = None,
        proposer: Proposer | None = None,
        control_tokens: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`waiting` is the number of answers that may wait, and `key` the API key, or None. As many answers run at once
        as `group`, whose first member is `engine`, has sequences; with a `proposer` it must have one.

        With `control_tokens`, special tokens that a message spells out count as such. `template_options` of the chat
        template hold where a request has none. Raises InputError for those that it does not read.
        """
        self._control_tokens, self._template_options = control_tokens, template_options or {}
        tokenizer.check_options(self._template_options, control_tokens=control_tokens)
        self.name, self._key, self._tokenizer, self._proposer = name, key, tokenizer, proposer
        self._sessions = SharedSessions(group or Alone(engine))
        self._worker = Worker(waiting, self._sessions)
        self._metrics = Metrics(lambda: self._worker.pending)
        self._begun = int(time.time())
        self._arriving_bytes = 0
        self._preparing = threading.Lock()  # one text is encoded at a time: a megabyte takes 160 MB
        self._grammars = functools.cache(lambda: Grammars(tokenizer, engine.vocab_size))

    def cancel_all(self) -> None:
        """End all answers within one token and accept no more."""
        self._worker.cancel_all()

    def close(self) -> None:
        """Cancel all answers and stop the worker. The caller closes the engine. May be called twice."""
        self._worker.close()

    def application(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            *(Route(path, self._complete, methods=["POST"]) for path in KINDS),
        ]
        hosts = [Middleware(LocalHosts)] if self._key is None else []
        handlers: dict[Any, Any] = {HTTPException: self._refuse_http, MerinoError: self._refuse}
        return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers)

    # --- health, metrics, models ---

    async def _health(self, _: Request) -> Response:
        if not self._worker.is_alive:
            return JSONResponse({"status": "the engine's thread has ended; start the server again"}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics_text(self, request: Request) -> Response:
        self._check_key(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._begun, "owned_by": "merino-edge"}

    # --- answers ---

    async def _complete(self, request: Request) -> Response:
        self._check_key(request)
        body, path = await self._body(request), request.scope["path"]
        self._worker.claim()
        cancel = threading.Event()
        try:
            parsed, generation, notes = await run_in_threadpool(self._prepared, KINDS[path], body, cancel)
        except BaseException as error:
            self._worker.release()
            if isinstance(error, (HTTPException, MerinoError)) or not isinstance(error, Exception):
                raise
            return await self._refuse(request, error)
        answer = Answer(generation, cancel, self._metrics)
        self._worker.submit(answer.job)
        reply = Reply(self.name, path == "/v1/chat/completions", generation, notes)
        if parsed.stream:
            self._metrics.answered(path, 200)
            events = self._events(answer, reply, with_usage=parsed.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)
        return await self._whole(answer, reply, request)

    def _prepared(
        self, kind: type[requests.Request], body: bytes, cancel: threading.Event
    ) -> tuple[requests.Request, Generation, list[str]]:
        """The request, its answer, which has not begun, and what the client should know.

        Runs in a thread: a long prompt takes a second.
        """
        request = requests.parse(kind, body)
        self._check_name(request.model or self.name)
        with self._preparing:
            prompt_ids = request.prompt_ids(
                self._tokenizer, control_tokens=self._control_tokens, options=self._template_options
            )
            grammar, notes = request.grammar(self._grammars), request.notes(self._tokenizer, self._template_options)
        generation = generate(
            self._sessions.every[0],  # the worker gives it another when it begins
            self._tokenizer,
            prompt_ids,
            request.sampling(),
            request.token_limit,
            stop=request.stop_strings(),
            cancel=cancel,
            grammar=grammar,
            proposer=self._proposer,  # follows one text at a time, and so does a worker that has one
            continues=kind is requests.TextRequest or grammar is not None,  # a form counts its first space
        )
        return request, generation, notes

    async def _body(self, request: Request) -> bytes:
        """The request's body. Raises HTTPException where it is not JSON by its type, too large, or does not arrive."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page of another site cannot send it.
            raise HTTPException(415, "the content type must be application/json")
        body = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                self._arriving_bytes += len(chunk)
                if len(body) > limits.MAX_REQUEST_BYTES:
                    reason = f"more than {limits.MAX_REQUEST_BYTES} bytes; see merino_edge/limits.py"
                    raise HTTPException(413, reason)
                if self._arriving_bytes > MAX_ARRIVING_BYTES:
                    raise Busy("too many requests are arriving", "ask again in a moment")

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:  # until Python 3.11 it is another than TimeoutError
            raise HTTPException(408, f"the request took more than {BODY_SECONDS} s to arrive", CLOSES) from None
        except ClientDisconnect:
            raise HTTPException(400, "the request ended within its body", CLOSES) from None
        finally:
            self._arriving_bytes -= len(body)
        return bytes(body)

    async def _whole(self, answer: Answer, reply: Reply, request: Request) -> Response:
        text, disconnect = asyncio.ensure_future(answer.text()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({text, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            answer.cancel.set()  # has no effect on a finished answer
            await text
            reply.check_is_whole()
        except Exception as error:
            return await self._refuse(request, error)
        finally:
            answer.cancel.set()
            disconnect.cancel()
        self._metrics.answered(request.scope["path"], 200)
        return JSONResponse(reply.whole())

    async def _events(self, answer: Answer, reply: Reply, *, with_usage: bool) -> AsyncIterator[str]:
        try:
            yield reply.first()
            async for text in answer.pieces():
                yield reply.piece(text) if text else PING
            reply.check_is_whole()
            yield reply.last(with_usage=with_usage)
        except Exception as error:
            _, document = refusal(error)
            yield error_event(document)
        finally:  # also when the client has disconnected
            answer.cancel.set()

    # --- refusals ---

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent, known = key.encode("latin-1"), self._key.encode(errors="surrogateescape")  # the bytes of both
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, known):
            raise HTTPException(401, "the API key is missing or wrong")

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise NoModel(f"there is no model {name[:80]!r} here; it is {self.name!r}")

    async def _refuse_http(self, request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        self._metrics.answered(path if path in KINDS else "other", error.status_code)
        of_model = isinstance(error, NoModel)
        code = "model_not_found" if of_model else {401: "invalid_api_key", 404: "not_found"}.get(error.status_code)
        detail = error.detail
        if error.status_code == 404 and not of_model:
            detail = f"there is no {path[:80]!r} here; see docs/runtime.md"
        document = error_document(detail, "invalid_request_error", code, "model" if of_model else None)
        return JSONResponse(document, error.status_code, headers=error.headers)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        status, document = refusal(error)
        self._metrics.answered(request.scope["path"], status)
        headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Busy) else {}
        return JSONResponse(document, status, headers=headers)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
