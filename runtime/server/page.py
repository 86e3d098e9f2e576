"""The chat page of the server: one file, which asks nobody but this server.

Its policy names the page's own script and style by their hashes, so that no text of a model or a user can become one.
Source: https://www.w3.org/TR/CSP3/.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


@functools.cache
def text() -> str:
    """The page's HTML."""
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")


@functools.cache
def headers() -> dict[str, str]:
    """The headers of the page, with its content security policy."""
    allowed = {f"{tag}-src": _hashes(tag) for tag in ("script", "style")}
    policy = {
        "default-src": "'none'",
        **allowed,
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _hashes(tag: str) -> str:
    inner = re.findall(rf"<{tag}>(.*?)</{tag}>", text(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inner)


async def show(_: Request) -> Response:
    """The page. It holds no secret, so it needs no key: it asks for one where the server does."""
    return HTMLResponse(text(), headers=headers())
