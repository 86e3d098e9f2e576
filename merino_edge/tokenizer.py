"""The tokenizer: text to token ids and back, and the chat template.

It wraps the `tokenizers` library. A checkpoint and a bundle hold `tokenizer.json` (the library's own format) and
`chat.json`:

    {"eos_token_ids": [2], "bos_token_id": null, "chat_template": "{% for ... %}" or null, "stop_strings": ["\\n\\n"]}

`bos_token_id` is put before every prompt unless it is null. The template is Jinja and comes from the model's author, so
it is rendered within bounds (merino_edge.chat_template). So is a text encoded. This module knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merino_edge import artefact, limits, message_content, message_texts, tokenizer_file
from merino_edge.errors import ArtefactError, InputError, MerinoError
from merino_edge.foreign_call import call
from merino_edge.tokenizer_file import Growth

if TYPE_CHECKING:
    import tokenizers

    from merino_edge.control_tokens import ControlTokens

FAILED, OTHER_MODEL = "the tokenizer fails on this text", "give another text, or use another model"
# {"role": "system" | "user" | "assistant" | "tool", "content": text}; "tool_calls", "tool_call_id" as in transformers
Message = dict[str, Any]
INCOMPLETE = "\ufffd"  # how an unfinished (or invalid) byte sequence decodes
CONTEXT_IDS = (4, 8, 16)  # how many ids before a continuation are decoded with it: more where they have no text


@dataclass(frozen=True)
class ChatFormat:
    """The content of `chat.json`: end tokens, BOS token, chat template and stop strings."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    chat_template: str | None = None
    stop_strings: tuple[str, ...] = ()  # texts that end an answer too; left out of the file where there are none

    @property
    def largest_token_id(self) -> int:
        """The largest id of a special token; -1 where there is none."""
        return max((*self.eos_token_ids, -1 if self.bos_token_id is None else self.bos_token_id), default=-1)

    def to_json(self) -> str:
        """The text of `chat.json`."""
        fields = {name: value for name, value in asdict(self).items() if value or name != "stop_strings"}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def load(path: Path) -> ChatFormat:
        """Read a `chat.json`. Raises ArtefactError."""
        value = artefact.parse_json(artefact.read_text(path), str(path))
        try:
            ids, bos, template = tuple(value["eos_token_ids"]), value["bos_token_id"], value["chat_template"]
            tokens = ids if bos is None else (*ids, bos)
            if not all(type(token) is int and 0 <= token < limits.MAX_VOCAB_SIZE for token in tokens):
                raise ValueError
            if not (template is None or isinstance(template, str)):
                raise TypeError
            stops = tuple(value.get("stop_strings", []))
            if (
                not isinstance(value.get("stop_strings", []), list)
                or len(stops) > limits.MAX_MODEL_STOPS
                or not all(isinstance(stop, str) and stop for stop in stops)
            ):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ArtefactError(f"{path} is not a chat.json of merino-edge", "make the artefact again") from None
        if template is not None and len(template.encode(errors="replace")) > limits.MAX_TEMPLATE_BYTES:
            raise ArtefactError(
                f"{path}: chat template over {limits.MAX_TEMPLATE_BYTES} bytes", "see merino_edge/limits.py"
            )
        return ChatFormat(ids, bos, template, stops)


class Tokenizer:
    """Encodes and decodes text. `apply_template` turns a conversation into the text of a prompt."""

    def __init__(self, backend: tokenizers.Tokenizer, chat: ChatFormat, growth: Growth | None = None) -> None:
        """`growth`: how long a backend that comes from a file can make a text."""
        self.backend = backend
        self.chat = chat
        self.growth = growth or Growth()

    @staticmethod
    def load(folder: Path | str) -> Tokenizer:
        """Read `tokenizer.json` and `chat.json` of a checkpoint or bundle. Raises ArtefactError."""
        file = Path(folder) / "tokenizer.json"
        backend, growth = tokenizer_file.load(artefact.read_text(file), str(file))
        return Tokenizer(backend, ChatFormat.load(file.with_name("chat.json")), growth)

    def with_chat(self, chat: ChatFormat) -> Tokenizer:
        """The same tokenizer with another chat format."""
        return Tokenizer(self.backend, chat, self.growth)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def sha256(self) -> str:
        """The hash of the tokenizer without its chat format. A corpus records the hash of its tokenizer."""
        return artefact.sha256_text(self.backend.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after BOS where the model wants it. Raises InputError for text that cannot be used.

        Special tokens that are spelled out in the text are recognised.
        """
        _check_size(text)
        ids = self._ids(text)
        return ids if self.chat.bos_token_id is None else [self.chat.bos_token_id, *ids]

    def _ids(self, text: str) -> list[int]:
        return list(self.encode_batch([text], quiet=True)[0].ids)

    def encode_batch(
        self, texts: Sequence[str], *, offsets: bool = False, quiet: bool = False
    ) -> list[tokenizers.Encoding]:
        """What the library makes of texts of any length, without BOS. Other threads run meanwhile.

        `offsets`: with the place of each token in its text. `quiet`: see merino_edge.foreign_call. Raises InputError
        for a text that grows too long in it, ArtefactError where the tokenizer fails or does not end.
        """
        size_bytes = sum(self._checked_bytes(text) for text in texts)
        encode = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
        return call(
            lambda: encode(list(texts), add_special_tokens=False),
            FAILED,
            OTHER_MODEL,
            seconds=limits.TOKENIZER_SECONDS + limits.TOKENIZER_SECONDS_PER_MB * size_bytes / 1e6,
            quiet=quiet,
        )

    def _checked_bytes(self, text: str) -> int:
        """The bytes of a text. Raises InputError where the tokenizer's steps make too many of them."""
        size_bytes, growth = len(text.encode(errors="replace")), self.growth
        most_bytes = max(limits.MAX_NORMALIZED_BYTES, limits.MOST_HARMLESS_GROWTH * size_bytes)
        if size_bytes * growth.normalizer * growth.pre_tokenizer <= most_bytes:
            return size_bytes
        # The bound is far from met, as a rule. So the text is normalized piece by piece, and what comes out is counted.
        normalizer, grown = self.backend.normalizer, 0.0
        piece = max(1, int(limits.MAX_NORMALIZED_BYTES / growth.normalizer / 4))
        for at in range(0, len(text), piece):
            part = text[at : at + piece]
            if normalizer is not None:
                part = call(partial(normalizer.normalize_str, part), FAILED, OTHER_MODEL, quiet=True)
            grown += len(part.encode(errors="replace")) * growth.pre_tokenizer
            if grown > most_bytes:
                raise InputError(f"the tokenizer makes a text of {size_bytes} bytes too long", "shorten it")
        return size_bytes

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        control_tokens: bool = False,
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        begun: str = "",
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant starts. Raises as `apply_template` and `encode` do.

        A control token that a message spells out is plain text, unless `control_tokens`. In `options` it is refused.
        `tools` are described by the template. `begun` is the beginning of the assistant's answer, which goes on there.
        """
        messages = message_content.plain(messages)
        self.check_options(options or {}, control_tokens=control_tokens)
        bos, markers = self.chat.bos_token_id, ""
        if self.chat.chat_template is not None and not control_tokens:
            whole = message_texts.Conversation(messages, tools, begun)
            whole, markers = whole.marked(self._control_tokens, partial(self.encode_batch, offsets=True))
            messages, tools, begun = whole.messages, whole.tools, whole.begun
        text = self.apply_template(messages, options=options, tools=tools) + begun
        if markers:
            _check_size(text)
            apart = partial(self._control_tokens.encode, text, markers, self._ids)
            ids = [*self.encode(""), *call(apart, FAILED, OTHER_MODEL, quiet=True)]
        else:
            ids = self.encode(text)
        return ids[1:] if ids[:2] == [bos, bos] else ids  # some templates write the BOS that `encode` adds

    def marked(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """The messages with two markers around the control tokens that they spell out, and the markers; "" if none.

        What a template makes of them goes to `encode_marked`. Raises as `encode_chat` does.
        """
        return self._control_tokens.marked(messages, partial(self.encode_batch, offsets=True))

    def encode_marked(self, text: str, markers: str) -> tuple[list[int], list[int]]:
        """Token ids [N] of a text with such markers, without BOS, and where each token begins in it [N]."""
        encode = partial(self.encode_batch, offsets=True)
        return call(lambda: self._control_tokens.encode_placed(text, markers, encode), FAILED, OTHER_MODEL, quiet=True)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return call(
            lambda: str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)),
            "the tokenizer cannot decode what the model answered",
            OTHER_MODEL,
        )

    def last_ids(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """The last few of `ids`, and their text. What follows is decoded after them.

        Some decoders leave out a space at the beginning of a text (SentencePiece). There is nothing to return where the
        ids end within a character, or have no text.
        """
        for count in CONTEXT_IDS:
            last = list(ids[-count:])
            text = self.decode(last)
            if text and INCOMPLETE not in (text[0], text[-1]):
                return last, text
            if count >= len(ids):
                break
        return [], ""

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` as it follows the text of `prompt`."""
        last, before = self.last_ids(prompt)
        return self.decode([*last, *ids])[len(before) :]

    def check_options(self, options: Mapping[str, Any], *, control_tokens: bool = False) -> None:
        """Raise InputError for options that the template does not read, or that spell a control token out."""
        from merino_edge import template_options

        def holds(text: str) -> bool:
            return not control_tokens and self._control_tokens.holds(text)

        template_options.check(self.chat.chat_template, options, holds)

    def apply_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt for a conversation, up to where the assistant starts.

        Without `add_generation_prompt` it ends with the last message. `options` are the template's own, such as
        enable_thinking; one that is left out has the template's default. `tools` are described where the template knows
        them. Raises InputError where there is no template or where the template refuses the messages, ArtefactError
        where the template fails.
        """
        if self.chat.chat_template is None:
            raise InputError("the tokenizer has no chat template", "give a plain text in place of messages")
        messages = message_content.plain(messages)
        for message in messages:
            message_texts.utf8_bytes(message["content"])  # else it would seem to be the template's mistake
        context: dict[str, Any] = {**(options or {}), "messages": list(messages)}
        context["add_generation_prompt"] = add_generation_prompt
        context |= {"tools": list(tools) or None, "documents": None}  # as transformers says that there are none
        ids = {"bos_token": self.chat.bos_token_id, "eos_token": next(iter(self.chat.eos_token_ids), None)}
        tokens = {name: None if i is None else self.backend.id_to_token(i) for name, i in ids.items()}
        context |= {name: token for name, token in tokens.items() if token is not None}
        from merino_edge import chat_template

        if tools and "xml_tools" in chat_template.variables(self.chat.chat_template):  # SmolLM3's name
            context["xml_tools"] = list(tools)
        return chat_template.render(self.chat.chat_template, context)

    def drops_system(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> bool:
        """Whether the template leaves a system message of these out. Raises as `apply_template` does."""
        if not any(message["role"] == "system" and message["content"].strip() for message in messages):
            return False
        text = self.apply_template(messages, options=options)
        for i, message in enumerate(messages):
            content = message["content"].strip() if message["role"] == "system" else ""
            # A template may write it in another form, as JSON. So what it writes without the message decides.
            if content and content not in text and self._without(messages, i, options) == text:
                return True
        return False

    def _without(self, messages: Sequence[Message], at: int, options: Mapping[str, Any] | None) -> str | None:
        try:
            return self.apply_template([*messages[:at], *messages[at + 1 :]], options=options)
        except MerinoError:  # it wants the message
            return None

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        from merino_edge.control_tokens import ControlTokens

        return ControlTokens(self.backend, self.chat.chat_template or "")


def _check_size(text: str) -> None:
    if message_texts.utf8_bytes(text) > limits.MAX_PROMPT_BYTES:
        raise InputError(f"text of more than {limits.MAX_PROMPT_BYTES} bytes", "shorten it (merino_edge/limits.py)")


def compact(tokenizer_json: str, where: str) -> str:
    """The text of a `tokenizer.json` with fewer bytes: 60 % fewer for tokenizers like GPT-2's.

    It has no spaces between values, and spells merges "a b" instead of ["a", "b"], which `tokenizers` also reads.
    Raises ArtefactError naming `where` the text is from.
    """
    value = artefact.parse_json(tokenizer_json, where)
    merges = value.get("model", {}).get("merges")
    if merges and all(isinstance(merge, list) and not any(" " in part for part in merge) for merge in merges):
        value["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
