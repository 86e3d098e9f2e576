"""Control tokens in messages: what a user writes never becomes a token such as the end of a turn.

A control token that a message spells out is put between two markers before the template renders it. After that the
text between markers is encoded as plain text, and the rest as usual. So a prompt without such a token has the same
tokens as in transformers, and one with it those of its option `sanitize_control_tokens`. The assistant's own words may
hold what its template writes in answers, such as <think>, but no special token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from merino_edge import chat_template
from merino_edge.errors import InputError

if TYPE_CHECKING:
    import tokenizers

MARKERS = range(0xFDD0, 0xFDF0)  # Unicode's noncharacters: no text that is exchanged has one
Message = dict[str, Any]


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the added tokens that its template writes."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        """Raises ArtefactError where the template cannot be read."""
        written = chat_template.literals(template)
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._contents = {i: token.content for i, token in added.items()}
        self._special = {i for i, token in added.items() if token.special}
        self._all = self._special | {
            i for i, token in added.items() if token.content in written and not token.content.isspace()
        }
        # Most messages have no character that begins such a token. A normalizer can make one from others.
        tokens = [added[i] for i in self._all]
        self._begins = None if any(token.normalized for token in tokens) else {token.content[:1] for token in tokens}

    def marked(self, messages: Sequence[Message], encodings: Any) -> tuple[list[Message], str]:
        """The messages with markers around control tokens, and the two markers; "" where there was nothing to mark.

        `encodings` gives the library's encodings of texts, with offsets. Raises InputError for a text that already
        holds every character that could be a marker.
        """
        doubtful = [i for i, message in enumerate(messages) if self._may_hold(message["content"])]
        if not doubtful:
            return list(messages), ""
        spans: dict[int, list[tuple[int, int]]] = {}
        for i, encoding in zip(doubtful, encodings([messages[i]["content"] for i in doubtful]), strict=True):
            control = self._special if messages[i]["role"] == "assistant" else self._all
            found = [
                self._narrowed(messages[i]["content"], token, *span)
                for token, span in zip(encoding.ids, encoding.offsets, strict=True)
                if token in control and span[0] < span[1]
            ]
            if found:
                spans[i] = found
        if not spans:
            return list(messages), ""
        used = set().union(*(message["content"] for message in messages))
        free = [chr(code) for code in MARKERS if chr(code) not in used][:2]
        if len(free) < 2:
            raise InputError("the messages hold control tokens and every noncharacter of Unicode", "leave them out")
        begin_mark, end_mark = free
        marked = list(messages)
        for i, found in spans.items():
            text, at, parts = messages[i]["content"], 0, []
            for begin, end in found:
                parts += [text[at:begin], begin_mark, text[begin:end], end_mark]
                at = end
            marked[i] = {**messages[i], "content": "".join([*parts, text[at:]])}
        return marked, begin_mark + end_mark

    def _narrowed(self, text: str, token: int, begin: int, end: int) -> tuple[int, int]:
        """The place of the token's own words: some tokens take the white space beside them too."""
        content = self._contents[token]
        at = text.find(content, begin, end)
        return (begin, end) if at < 0 else (at, at + len(content))

    def holds(self, text: str) -> bool:
        """Whether a text spells a control token out."""
        return any(self._contents[i] in text for i in self._all)

    def _may_hold(self, text: str) -> bool:
        return bool(text) and (self._begins is None or not self._begins.isdisjoint(text))

    def encode(self, rendered: str, markers: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a rendered text whose marked parts are plain text. `encode` gives the ids of other parts.

        Each part is encoded after a line break, because some tokenizers put a space before a text.
        """
        line_break, ids = encode("\n"), list[int]()
        for number, (text, plain, _) in enumerate(_parts(rendered, markers)):
            encode_part = self._as_text if plain else encode
            after = encode_part("\n" + text) if plain or number else []
            follows = after and after[: len(line_break)] == line_break
            ids += after[len(line_break) :] if follows else encode_part(text)
        return ids

    def encode_placed(self, rendered: str, markers: str, encodings: Any) -> tuple[list[int], list[int]]:
        """Like `encode`, with the character of `rendered` at which each token begins. `encodings` as in `marked`."""

        def encode(text: str) -> list[int]:
            return list(encodings([text])[0].ids)

        line_break, ids, begins = encode("\n"), list[int](), list[int]()
        for number, (text, plain, at) in enumerate(_parts(rendered, markers)):
            after, alone = encodings(["\n" + text, text])
            if plain:
                made = self.encode(text.join(markers), markers, encode)
                places = [at] * len(made)
            elif number and after.ids[: len(line_break)] == line_break:
                made = after.ids[len(line_break) :]
                places = [at + max(0, begin - 1) for begin, _ in after.offsets[len(line_break) :]]
            else:
                made, places = alone.ids, [at + begin for begin, _ in alone.offsets]
            ids += made
            begins += places
        return ids, begins

    def _as_text(self, text: str) -> list[int]:
        """The tokens of a text, none of which is a control token. It is short: what a control token matches."""
        ids = self._plain(text)
        if self._all.isdisjoint(ids):
            return ids
        # The model itself makes the token, as Unigram does where it is in the vocabulary. No single character is one.
        return [i for character in text for i in self._plain(character) if i not in self._all]

    def _plain(self, text: str) -> list[int]:
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        splits = [text]
        if backend.pre_tokenizer is not None:
            splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in backend.model.tokenize(split)]


def _parts(rendered: str, markers: str) -> list[tuple[str, bool, int]]:
    """A rendered text as (text, whether it is to be plain text, where it begins), without the two markers.

    A template may have cut a marked token, so that one marker stands alone: it is left out. A template that writes
    JSON may have escaped the markers.
    """
    begin, end = (f"(?:{mark}|\\\\u{ord(mark):04x})" for mark in markers)
    found: list[tuple[str, bool, int]] = []
    at = 0
    for match in re.finditer(f"{begin}([^{markers}]*?){end}|{begin}|{end}", rendered):
        found.append((rendered[at : match.start()], False, at))
        if match[1]:
            found.append((match[1], True, match.start(1)))
        at = match.end()
    return [part for part in [*found, (rendered[at:], False, at)] if part[0]]
