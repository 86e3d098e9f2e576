"""References within a schema: `$ref` with a JSON pointer. Nothing is fetched.

Source: RFC 6901 (JSON pointers).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from merino_edge.errors import InputError

HINT = "see docs/runtime.md"


class SchemaError(InputError):
    """A schema that is wrong, or whose answers could not end."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the JSON schema cannot be used: {message}", HINT)
        self.reason = message


class NotHeldError(SchemaError):
    """A schema asks for what no grammar can hold an answer to."""


class References:
    """Finds what the references of one schema name."""

    def __init__(self, root: Any) -> None:
        self._root = root
        identity = root.get("$id", root.get("id")) if isinstance(root, dict) else None
        self._base = identity.removesuffix("#") if isinstance(identity, str) else ""

    def pointer(self, reference: Any, at: str) -> str:
        """The JSON pointer of a reference. Raises SchemaError where it is of another document."""
        if not isinstance(reference, str):
            raise SchemaError(f"$ref at {at} is no text")
        text = reference.removeprefix(self._base) if self._base else reference
        if text in ("", "#"):
            return ""
        if not text.startswith("#/"):
            raise SchemaError(f"$ref at {at} names {reference[:80]!r}, and this program does not fetch schemas")
        return unquote(text[1:])

    def target(self, pointer: str, at: str) -> Any:
        """What a JSON pointer names. Raises SchemaError where there is nothing."""
        value = self._root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise SchemaError(f"$ref at {at} names #{pointer[:80]}, which is not there")
        return value

    def resolved(self, schema: Any, at: str) -> Any:
        """`schema`, or what it names where it is a reference and nothing else that counts."""
        seen = set[str]()
        while isinstance(schema, dict) and "$ref" in schema:
            pointer = self.pointer(schema["$ref"], at)
            if pointer in seen:
                raise SchemaError(f"$ref at {at} names itself")
            seen.add(pointer)
            schema = self.target(pointer, at)
        return schema
