"""The bytes of single tokens. A token may be a part of a character, which no decoder can show."""

from __future__ import annotations

import re

from merino_edge.tokenizer import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # how SentencePiece writes one


class TokenBytes:
    """The bytes of each token of a tokenizer, and a text that stands for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._added = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        decoder = self._backend.decoder
        byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()  # its JSON
        self._alphabet = _byte_alphabet() if byte_level else None

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes; none for ids that no text has."""
        if token in self._added:
            return self._added[token].encode()
        written = self._backend.id_to_token(token) or ""
        if self._alphabet is not None and all(character in self._alphabet for character in written):
            return bytes(self._alphabet[character] for character in written)
        if match := BYTE.fullmatch(written):
            return bytes([int(match[1], 16)])
        return written.replace(SPACE, " ").encode()

    def text_of(self, token: int) -> str:
        r"""The token's text. A part of a character is written as OpenAI does, for example `bytes:\xe2\x9c`."""
        return text_of(self.bytes_of(token))


def text_of(data: bytes) -> str:
    """The text of a token's bytes; see `TokenBytes.text_of`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _byte_alphabet() -> dict[str, int]:
    """The bytes by the characters that byte-level BPE writes for them. Source: GPT-2's encoder.py."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
