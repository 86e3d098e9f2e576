"""Refusals of the server: the HTTP status and OpenAI's document of an error, and requests by a foreign host name."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from merino_edge.errors import ContextLengthError, InputError, MerinoError, MissingExtraError
from merino_edge.runtime.server.chat_request import ChatRequest
from merino_edge.runtime.server.replies import error_document
from merino_edge.runtime.server.strict import FieldError
from merino_edge.runtime.server.text_request import TextRequest
from merino_edge.runtime.server.worker import Busy, Stopping

LOCAL_NAMES = ["localhost", "127.0.0.1", "::1"]


class LocalHosts:
    """Refuses requests whose `Host` is not this machine: a web page can reach the server through a name of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = Headers(scope=scope).get("host", "") if scope["type"] == "http" else LOCAL_NAMES[0]
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{name}").hostname or ""
        if name in LOCAL_NAMES:
            await self._app(scope, receive, send)
            return
        message = f"the host {name[:80]!r} is not served without an API key; ask for localhost, or start with --api-key"
        await JSONResponse(error_document(message, "invalid_request_error"), 400)(scope, receive, send)


class NoModel(HTTPException):
    """A name that is not the model's."""

    def __init__(self, detail: str) -> None:
        super().__init__(404, detail)


def _field(message: str) -> str | None:
    """The field of a request that a message begins with, such as `top_p is 2.0` or `the prompt has`."""
    word = message.removeprefix("the ").partition(" ")[0].partition("'")[0]
    return word if word in ChatRequest.model_fields or word in TextRequest.model_fields else None


def refusal(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the document of an error."""
    if isinstance(error, Busy):
        return 429, error_document(str(error), "rate_limit_error", "queue_full")
    if isinstance(error, Stopping):
        return 503, error_document(str(error), "server_error", "stopping")
    if isinstance(error, (InputError, MissingExtraError)):
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_value"
        field = None if isinstance(error, ContextLengthError) else _field(error.message)
        if isinstance(error, FieldError):
            code, field = error.code or code, error.field
        return 400, error_document(str(error), "invalid_request_error", code, field)
    message = str(error) if isinstance(error, MerinoError) else f"the engine failed ({type(error).__name__})"
    return 500, error_document(message, "server_error")
