"""Every answer has the header `x-request-id`: the client's own, or one that is made here."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "x-request-id"
PLAIN = re.compile(r"[\x21-\x7e]{1,128}")  # what may stand in a header, and in a log


class RequestIds:
    """Adds the header to all answers of an application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(NAME, "") if scope["type"] == "http" else ""
        identity = given if PLAIN.fullmatch(given) else f"req_{secrets.token_hex(12)}"

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[NAME] = identity
            await send(message)

        await self._app(scope, receive, with_id)
