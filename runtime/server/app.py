"""The HTTP application: OpenAI's chats, completions, responses and models, tokens, /health, /metrics, a page.

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
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from merino_edge.errors import MerinoError
from merino_edge.runtime.call_parser import CallParser
from merino_edge.runtime.engine import Alone, Engine, SequenceGroup
from merino_edge.runtime.generation import generate
from merino_edge.runtime.grammar import Grammars
from merino_edge.runtime.server import page, requests
from merino_edge.runtime.server.answer import Answers
from merino_edge.runtime.server.bodies import Bodies
from merino_edge.runtime.server.chat_request import ChatRequest
from merino_edge.runtime.server.choice import Choice
from merino_edge.runtime.server.metrics import Metrics
from merino_edge.runtime.server.refusals import LocalHosts, NoModel, refusal
from merino_edge.runtime.server.replies import PING, ChatReply, CompletionReply, Reply, TextReply, error_document
from merino_edge.runtime.server.request_ids import RequestIds
from merino_edge.runtime.server.responses_reply import ResponsesReply
from merino_edge.runtime.server.responses_request import ResponsesRequest
from merino_edge.runtime.server.strict import FieldError
from merino_edge.runtime.server.text_request import TextRequest
from merino_edge.runtime.server.tokens_api import TokensApi
from merino_edge.runtime.server.worker import Busy, Worker
from merino_edge.runtime.shared_sessions import SharedSessions
from merino_edge.runtime.speculative.drafter import Proposer
from merino_edge.runtime.token_bytes import TokenBytes
from merino_edge.tokenizer import Tokenizer

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each event on at once
T = TypeVar("T")
KINDS: dict[str, type[requests.Request] | type[ResponsesRequest]] = {
    "/chat/completions": ChatRequest,
    "/completions": TextRequest,
    "/responses": ResponsesRequest,
}
ROOTS = ("/v1", "")  # llama.cpp's clients leave the first out


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
        fingerprint: str = "",
    ) -> None:
        """`waiting` is the number of answers that may wait, and `key` the API key, or None. As many answers run at once
        as `group`, whose first member is `engine`, has sequences; with a `proposer` it must have one.

        With `control_tokens`, special tokens that a message spells out count as such. `template_options` of the chat
        template hold where a request has none. `fingerprint` tells clients whether answers with one seed may differ.
        Raises InputError for options that the template does not read.
        """
        self._control_tokens, self._template_options = control_tokens, template_options or {}
        tokenizer.check_options(self._template_options, control_tokens=control_tokens)
        self.name, self._key, self._tokenizer, self._proposer = name, key, tokenizer, proposer
        self._sessions = SharedSessions(group or Alone(engine))
        self._worker = Worker(waiting, self._sessions)
        self._metrics = Metrics(lambda: self._worker.pending)
        self._begun, self.fingerprint = int(time.time()), fingerprint or f"fp_{tokenizer.sha256[:12]}"
        self._bodies, self._token_bytes = Bodies(), TokenBytes(tokenizer)
        self._tokens = TokensApi(
            tokenizer, self._token_bytes, engine, self._template_options, control_tokens=control_tokens
        )
        # One text is encoded at a time, since a megabyte takes 160 MB, and by one thread: glibc keeps some for each.
        self._preparing = ThreadPoolExecutor(1, "prepare")
        self._grammars = functools.cache(lambda: Grammars(tokenizer, engine.vocab_size))

    def cancel_all(self) -> None:
        """End all answers within one token and accept no more."""
        self._worker.cancel_all()

    def close(self) -> None:
        """Cancel all answers and stop the worker. The caller closes the engine. May be called twice."""
        self._worker.close()
        self._preparing.shutdown(cancel_futures=True)

    def application(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", page.show),
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
            *(Route(f"{root}/models", self._models) for root in ROOTS),
            *(Route(f"{root}/models/{{name:path}}", self._model) for root in ROOTS),
            *(Route(root + path, self._complete, methods=["POST"]) for path in KINDS for root in ROOTS),
            *(Route(path, self._tokens_api, methods=["POST"]) for path in self._tokens.paths),
            *(Route(f"{root}/embeddings", self._refuse_embeddings, methods=["POST"]) for root in ROOTS),
        ]
        hosts = [Middleware(RequestIds), *([Middleware(LocalHosts)] if self._key is None else [])]
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
        engine = self._sessions.every[0].engine
        head = {"id": self.name, "object": "model", "created": self._begun, "owned_by": "merino-edge"}
        context = engine.max_positions  # vLLM's name and llama.cpp's
        return {**head, "max_model_len": context, "meta": {"n_ctx_train": context, "n_vocab": engine.vocab_size}}

    async def _tokens_api(self, request: Request) -> Response:
        """Token ids of texts and texts of token ids: no engine is needed."""
        self._check_key(request)
        body, path = await self._bodies.read(request), request.scope["path"]

        with self._tokens.place():
            document = await self._in_turn(self._tokens.answer, path, body, self._check_name)
        self._metrics.answered(path, 200)
        return JSONResponse(document)

    async def _refuse_embeddings(self, request: Request) -> Response:
        self._check_key(request)
        raise FieldError("embeddings", "not served: a bundle's graph returns logits, no states", "not_served")

    # --- answers ---

    async def _complete(self, request: Request) -> Response:
        self._check_key(request)
        body, path = await self._bodies.read(request), request.scope["path"]
        self._worker.claim()
        cancel = threading.Event()
        try:
            reply, stream = await self._in_turn(self._prepared, KINDS[path.removeprefix("/v1")], body, cancel)
        except BaseException as error:
            self._worker.release()
            if isinstance(error, (HTTPException, MerinoError)) or not isinstance(error, Exception):
                raise
            return await self._refuse(request, error)
        answer = Answers(reply.choices, cancel, self._metrics, self._worker)
        if stream:
            self._metrics.answered(path, 200)
            return StreamingResponse(_events(answer, reply), media_type="text/event-stream", headers=UNBUFFERED)
        return await self._whole(answer, reply, request)

    async def _in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what encodes a text, once those that came before are done."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *arguments)

    def _prepared(
        self, kind: type[requests.Request] | type[ResponsesRequest], body: bytes, cancel: threading.Event
    ) -> tuple[Reply, bool]:
        """The reply, whose answers have not begun, and whether it is streamed.

        A long prompt takes a second.
        """
        asked = requests.parse(kind, body)
        request = asked.chat() if isinstance(asked, ResponsesRequest) else asked
        self._check_name(request.model or self.name)
        calls = request.call_grammar(self._tokenizer, self._grammars)
        grammar = calls[1] if calls else request.grammar(self._grammars)
        prompts = request.prompts(self._tokenizer, control_tokens=self._control_tokens, options=self._template_options)
        notes = request.notes(self._tokenizer, self._template_options)
        notes += () if grammar is None else grammar.notes
        form = calls[0] if calls else None
        choices: list[Choice] = []
        for prompt, ids in enumerate(prompts):
            for number in range(request.n):
                recorder = request.recorder()
                generation = generate(
                    self._sessions.every[0],  # the worker gives it another when it begins
                    self._tokenizer,
                    ids,
                    request.sampling(number),
                    request.token_limit,
                    stop=request.stop_strings(),
                    cancel=cancel,
                    grammar=grammar,
                    proposer=self._proposer,  # follows one text at a time, and so does a worker that has one
                    # A form counts its first space. A text beside calls has none.
                    continues=request.continues or (grammar is not None and form is None),
                    ends=request.ends(),
                    recorder=recorder,
                    show_special=form is not None,
                )
                parser = None if form is None else CallParser(form)
                echo = request.echoed(self._tokenizer, prompt)
                choices.append(Choice(len(choices), prompt, generation, parser, recorder, request.top, echo))
        kinds: dict[type, type[CompletionReply]] = {ChatRequest: ChatReply, TextRequest: TextReply}
        common = self.name, self.fingerprint, choices, self._token_bytes, notes
        if isinstance(asked, ResponsesRequest):
            return ResponsesReply(*common, request=asked), bool(asked.stream)
        return kinds[kind](*common, with_usage=request.include_usage), bool(request.stream)

    async def _whole(self, answers: Answers, reply: Reply, request: Request) -> Response:
        done, disconnect = asyncio.ensure_future(answers.finish()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({done, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            answers.cancel.set()  # has no effect on finished answers
            await done
        except Exception as error:
            return await self._refuse(request, error)
        finally:
            answers.cancel.set()
            disconnect.cancel()
        self._metrics.answered(request.scope["path"], 200)
        return JSONResponse(reply.whole())

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
        self._metrics.answered(path if path in self._paths else "other", error.status_code)
        of_model = isinstance(error, NoModel)
        code = "model_not_found" if of_model else {401: "invalid_api_key", 404: "not_found"}.get(error.status_code)
        detail = error.detail
        if error.status_code == 404 and not of_model:
            detail = f"there is no {path[:80]!r} here; see docs/runtime.md"
        document = error_document(detail, "invalid_request_error", code, "model" if of_model else None)
        return JSONResponse(document, error.status_code, headers=error.headers)

    @property
    def _paths(self) -> set[str]:
        return {root + path for path in KINDS for root in ROOTS} | set(self._tokens.paths)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        status, document = refusal(error)
        self._metrics.answered(request.scope["path"], status)
        headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Busy) else {}
        return JSONResponse(document, status, headers=headers)


async def _events(answers: Answers, reply: Reply) -> AsyncIterator[str]:
    try:
        for event in reply.first():
            yield event
        async for choice, parts in answers.parts():
            for event in reply.end(choice) if parts is None else reply.piece(choice, parts):
                yield event
            if parts == []:
                yield PING
        for event in reply.last():
            yield event
    except Exception as error:
        _, document = refusal(error)
        for event in reply.failed(document):
            yield event
    finally:  # also when the client has disconnected
        answers.cancel.set()


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
