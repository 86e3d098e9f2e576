"""Options of a chat template, such as `enable_thinking`: what a person may set, and what the template reads.

Names and values are those of `chat_template_kwargs` in other servers, and of further arguments to transformers'
`apply_chat_template`. A name that the template does not read is refused: it would change nothing, unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from merino_edge import artefact, chat_template, limits
from merino_edge.errors import ArtefactError, InputError

# What a prompt is made of already, and what the language itself has.
TAKEN = {"messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token"}
LANGUAGE = {"raise_exception", "strftime_now"}
WRITTEN = "chat_template_kwargs"


def names(template: str) -> list[str]:
    """The options that a template reads, sorted. Raises ArtefactError where it is no template."""
    return sorted(chat_template.variables(template) - TAKEN - LANGUAGE)


def parse(text: str, where: str) -> dict[str, Any]:
    """The options in a JSON object, as on a command line. Raises InputError."""
    if len(text) > limits.MAX_TEMPLATE_BYTES:
        raise InputError(f"{where} is longer than {limits.MAX_TEMPLATE_BYTES} characters", "shorten it")
    try:
        value = artefact.parse_json(text, where)
    except ArtefactError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{where} is no JSON object", f"write it so: {where} '{{\"enable_thinking\": false}}'")
    return value


def check(template: str | None, options: Mapping[str, Any], may_hold: Callable[[str], bool]) -> None:
    """Raise InputError for options without a template, names that it does not read, and texts that `may_hold` bars."""
    if not options:
        return
    if template is None:
        raise InputError(f"{WRITTEN} needs a chat template, and this model has none", "leave it out")
    known = names(template)
    for name in options:
        if name not in known:
            instead = f"it reads {', '.join(known)}" if known else "it has no options"
            raise InputError(f"the chat template does not read {name[:60]!r}", instead)
    if may_hold(json.dumps(options, ensure_ascii=False)):
        raise InputError(f"{WRITTEN} holds a control token of this model", "leave it out")
