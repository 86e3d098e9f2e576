"""Prompts for a teacher, from a handwritten file. This module knows no model.

A `.txt` file has one prompt per line. A `.json` file is an artefact of templates with {slots}; its `sha256` may be left
out:

    {"kind": "prompts", "schema_version": 1, "about": text,
     "templates": ["Tell a story about {animal} who {wish}.", ...],   or, with a share of the prompts each,
     "groups": [{"share": 2, "system": text, "asked": text, "templates": [...]}, ...],
     "slots": {"animal": ["a cat", "an owl", ...], "wish": [...], ...},
     "system": text, "asked": "{prompt} Use simple words.", "unwanted": [text, ...]}

Within a prompt {animal} has one value, and {animal:2} has another. `system` is the teacher's system message, and
`asked` rewrites the prompt for the teacher. Both may belong to the file or to a group, and neither goes into the
corpus. An answer that contains one of `unwanted`, in upper or lower case, is dropped. Only `templates` or `groups` is
required. Prompt i is a function of seed and i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import artefact, user_file
from merino_edge.errors import InputError

KIND = "prompts"
FOLDER = Path(__file__).parent.parent / "recipes" / "prompts"
FIELDS = (
    *artefact.ENVELOPE,
    *("about", "templates", "groups", "slots", "system", "asked", "unwanted"),
)
GROUP_FIELDS = ("share", "system", "asked", "templates")
PROMPT = "{prompt}"
SLOT = re.compile(r"\{([a-z_]+)(?::([1-9]))?\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt as it stands in the corpus (`user`), as the teacher gets it (`asked`), and its system message."""

    user: str
    asked: str
    system: str | None = None


@dataclass(frozen=True)
class Group:
    """Templates with a share of the prompts and their own wording for the teacher."""

    templates: tuple[str, ...]
    share: float = 1.0
    asked: str = PROMPT
    system: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file with this `name` and `sha256`. Lines are taken in order, templates are drawn."""

    name: str
    sha256: str
    lines: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()

    def prompt(self, seed: int, i: int) -> Prompt:
        """Prompt number `i`. Lines begin again after the last one."""
        if self.lines:
            line = self.lines[i % len(self.lines)]
            return Prompt(line, line)
        random = np.random.default_rng([seed, i])
        shares = np.cumsum([group.share for group in self.groups])
        group = self.groups[int(np.searchsorted(shares, random.random() * shares[-1], side="right"))]
        template = group.templates[int(random.integers(len(group.templates)))]
        orders: dict[str, list[int]] = {}

        def filled(match: re.Match[str]) -> str:
            name, number = match[1], int(match[2] or 1)
            if name not in orders:
                orders[name] = random.permutation(len(self.slots[name])).tolist()
            return self.slots[name][orders[name][number - 1]]

        user = SLOT.sub(filled, template)
        return Prompt(user, group.asked.replace(PROMPT, user), group.system)


def names() -> list[str]:
    """The names of the packaged prompts."""
    return user_file.names(FOLDER)


def load(name_or_path: Path | str) -> Prompts:
    """Packaged prompts by their name, or the prompts in a file. Raises ArtefactError, InputError."""
    path = user_file.find(FOLDER, name_or_path, "there are no prompts")
    text = artefact.read_text(path)
    sha256 = artefact.sha256_text(text)
    if path.suffix != ".json":
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not lines:
            raise InputError(f"{path} holds no prompt", "write one a line")
        return Prompts(path.name, sha256, lines)
    document = artefact.check_header(artefact.parse_json(text, str(path)), KIND, 1, str(path), handwritten=True)
    user_file.require_known(document, FIELDS, path)
    if ("templates" in document) == ("groups" in document):
        raise user_file.error(path, "has not one of templates and groups", 'write "templates": ["Say hello.", ...]')
    slots = document.get("slots", {})
    if not isinstance(slots, dict):
        raise user_file.error(path, "slots is no object", 'write "slots": {"animal": ["a cat", ...]}')
    values = {name: _texts(texts, f"slot {name}", path) for name, texts in slots.items()}
    groups = document.get("groups", [{"templates": document.get("templates")}])
    if not (isinstance(groups, list) and groups and all(isinstance(group, dict) for group in groups)):
        raise user_file.error(path, "groups is no list of objects", 'write "groups": [{"templates": [...]}]')
    defaults: dict[str, Any] = {name: document[name] for name in ("system", "asked") if name in document}
    parsed = tuple(_group({**defaults, **group}, values, path) for group in groups)
    unwanted = _texts(document["unwanted"], "unwanted", path) if "unwanted" in document else ()
    return Prompts(path.name, sha256, groups=parsed, slots=values, unwanted=unwanted)


def _group(value: dict[str, Any], slots: Mapping[str, tuple[str, ...]], path: Path) -> Group:
    user_file.require_known(value, GROUP_FIELDS, path)
    share, system, asked = value.get("share", 1), value.get("system"), value.get("asked", PROMPT)
    if type(share) not in (int, float) or not 1e-6 <= share <= 1e6:
        raise user_file.error(path, f"share is {share!r}", "give a number from 0.000001 to 1000000")
    if not (system is None or isinstance(system, str)):
        raise user_file.error(path, "system is no text", "leave it out")
    if not (isinstance(asked, str) and PROMPT in asked):
        raise user_file.error(path, f"asked is {asked!r}", f"write a text with {PROMPT} in it, or leave it out")
    templates = _texts(value.get("templates"), "templates", path)
    for template in templates:
        for name, number in SLOT.findall(template):
            if name not in slots:
                raise user_file.error(
                    path, f"{template!r} has a slot {name!r} that is not there", f"add it to slots: {name}"
                )
            if int(number or 1) > len(slots[name]):
                raise user_file.error(path, f"{template!r} wants {number} of {name!r}", "add values to that slot")
        if set("{}") & set(SLOT.sub("", template)):
            raise user_file.error(path, f"{template!r} has a brace that is no slot", "write {name} or {name:2}")
    return Group(templates, float(share), asked, system)


def _texts(value: Any, what: str, path: Path) -> tuple[str, ...]:
    if not (isinstance(value, list) and value and all(isinstance(item, str) and item.strip() for item in value)):
        raise user_file.error(path, f"{what} is no list of texts", "write one like this: [TEXT, TEXT]")
    return tuple(value)
