"""Bodies of requests: JSON by its type, of a bounded size, and within a time."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from merino_edge import limits
from merino_edge.runtime.server.worker import Busy

BODY_SECONDS = 30  # for a request to arrive whole, after its head
CLOSES = {"Connection": "close"}  # the rest of the request is not read
MAX_ARRIVING_BYTES = 64 * 2**20  # of all bodies that are arriving


class Bodies:
    """Reads the bodies of one server's requests, which share a bound of memory."""

    def __init__(self) -> None:
        self._arriving_bytes = 0

    async def read(self, request: Request) -> bytes:
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
