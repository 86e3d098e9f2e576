"""The application: OpenAI's /v1/chat/completions, /v1/completions and /v1/models, and /health and /metrics.

One answer is made at a time; others wait, and beyond `waiting` of them a request is refused with 429. A client that
goes away ends its answer within a token. Without a key only names of this machine are answered to, so that no web page
can reach the server under a name of its own. Knows no socket and no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from merino_edge import limits
from merino_edge.errors import InputError, MerinoError, MissingExtraError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import Grammars
from merino_edge.runtime.server import requests
from merino_edge.runtime.server.metrics import Metrics
from merino_edge.runtime.server.replies import Reply, error_document, error_event
from merino_edge.runtime.server.worker import Busy, Job, Worker
from merino_edge.runtime.session import Session
from merino_edge.runtime.speculative.drafter import Proposer
from merino_edge.tokenizer import Tokenizer

LOCAL_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]
RETRY_AFTER_SECONDS = 1
KINDS: dict[str, type[requests.Request]] = {
    "/v1/chat/completions": requests.ChatRequest,
    "/v1/completions": requests.TextRequest,
}


class Service:
    """One engine behind HTTP. `name`: the model's, as clients ask for it."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        *,
        waiting: int,
        key: str | None,
        proposer: Proposer | None = None,
    ) -> None:
        self.name, self._key, self._tokenizer, self._guesser = name, key, tokenizer, proposer
        self._session, self._worker = Session(engine), Worker(waiting)
        self._metrics = Metrics(lambda: self._worker.pending)
        self._begun = int(time.time())
        self._grammars = functools.cache(lambda: Grammars(tokenizer, engine.vocab_size))

    def cancel_all(self) -> None:
        """End every answer within a token, and take no more."""
        self._worker.cancel_all()

    def close(self) -> None:
        """As `cancel_all`, and leave the engine to whoever opened it. May be called twice."""
        self._worker.close()

    def application(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            *(Route(path, self._complete, methods=["POST"]) for path in KINDS),
        ]
        hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)] if self._key is None else []
        handlers: dict[Any, Any] = {HTTPException: self._refuse_http, MerinoError: self._refuse}
        return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers)

    # --- what is small ---

    async def _health(self, _: Request) -> Response:
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

    # --- an answer ---

    async def _complete(self, request: Request) -> Response:
        self._check_key(request)
        asked = requests.parse(KINDS[request.url.path], await _body(request))
        self._check_name(asked.model)
        cancel = threading.Event()
        generation = await run_in_threadpool(self._generation, asked, cancel)
        answer = _Answer(generation, cancel, self._metrics)
        self._worker.submit(answer.job)
        reply = Reply(self.name, request.url.path == "/v1/chat/completions", generation)
        if asked.stream:
            self._metrics.answered(request.url.path, 200)
            return StreamingResponse(self._events(answer, reply, with_usage=asked.include_usage), media_type="text/event-stream")
        return await self._whole(answer, reply, request)

    def _generation(self, asked: requests.Request, cancel: threading.Event) -> Generation:
        ids, stop = asked.prompt_ids(self._tokenizer), asked.stop_strings()
        sampling, grammar = asked.sampling(), asked.grammar(self._grammars)
        most, proposer = asked.most_tokens, self._guesser  # of one text at a time, as the worker makes one
        return generate(
            self._session,
            self._tokenizer,
            ids,
            sampling,
            most,
            stop=stop,
            cancel=cancel,
            grammar=grammar,
            proposer=proposer,
        )

    async def _whole(self, answer: _Answer, reply: Reply, request: Request) -> Response:
        made, gone = asyncio.ensure_future(answer.text()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
            answer.cancel.set()  # has an effect only where it is not made
            await made
        except Exception as error:
            return await self._refuse(request, error)
        finally:
            answer.cancel.set()
            gone.cancel()
        self._metrics.answered(request.url.path, 200)
        return JSONResponse(reply.whole())

    async def _events(self, answer: _Answer, reply: Reply, *, with_usage: bool) -> AsyncIterator[str]:
        try:
            yield reply.first()
            async for text in answer.pieces():
                yield reply.piece(text)
            yield reply.last(with_usage=with_usage)
        except Exception as error:
            _, document = _refusal(error)
            yield error_event(document)
        finally:  # reached too when the client is gone
            answer.cancel.set()

    # --- refusals ---

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise HTTPException(404, f"there is no model {name[:80]!r} here; it is {self.name!r}")

    async def _refuse_http(self, request: Request, error: HTTPException) -> Response:
        self._metrics.answered(request.url.path if request.url.path in KINDS else "other", error.status_code)
        code = {401: "invalid_api_key", 404: "model_not_found"}.get(error.status_code)
        document = error_document(error.detail, "invalid_request_error", code)
        return JSONResponse(document, error.status_code, headers=error.headers)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        status, document = _refusal(error)
        self._metrics.answered(request.url.path, status)
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if isinstance(error, Busy) else {}
        return JSONResponse(document, status, headers=headers)


class _Answer:
    """The event loop's side of a job: its pieces as they come."""

    def __init__(self, generation: Generation, cancel: threading.Event, metrics: Metrics) -> None:
        self.cancel = cancel
        loop, self._come = asyncio.get_running_loop(), asyncio.Queue[str | Exception | None]()

        def put(what: str | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._come.put_nowait, what)

        def end(failure: Exception | None) -> None:
            metrics.generated(generation.statistics)
            put(failure)

        self.job = Job(generation, cancel, on_piece=put, on_end=end)

    async def pieces(self) -> AsyncIterator[str]:
        """Those that have come since the last, as one. Raises what ended the answer."""
        while True:
            come = [await self._come.get()]
            while not self._come.empty():
                come.append(self._come.get_nowait())
            if text := "".join(piece for piece in come if isinstance(piece, str)):
                yield text
            if isinstance(come[-1], Exception):
                raise come[-1]
            if come[-1] is None:
                return

    async def text(self) -> str:
        return "".join([piece async for piece in self.pieces()])


def _refusal(error: Exception) -> tuple[int, dict[str, Any]]:
    """What an error is to a client: status and document."""
    if isinstance(error, Busy):
        return 429, error_document(str(error), "rate_limit_error", "queue_full")
    if isinstance(error, (InputError, MissingExtraError)):
        return 400, error_document(str(error), "invalid_request_error")
    said = str(error) if isinstance(error, MerinoError) else f"the engine failed ({type(error).__name__})"
    return 500, error_document(said, "server_error")


async def _body(request: Request) -> bytes:
    """Raises HTTPException where it is no JSON by its type, or too large."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")  # which no web page sends unasked
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.MAX_REQUEST_BYTES:
            raise HTTPException(413, f"more than {limits.MAX_REQUEST_BYTES} bytes; see merino_edge/limits.py")
    return bytes(body)


async def _gone(request: Request) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
