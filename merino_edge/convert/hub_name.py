"""A name of a model of the Hugging Face hub, and which of its repository's files it means.

    OWNER/NAME      OWNER/NAME@REVISION      OWNER/NAME:FILE.gguf or :QUANTISATION, of a repository with GGUF files

This module touches no network (merino_edge.convert.hub does).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from merino_edge.errors import InputError, UnsupportedError

# A path joins the two slashes of an address to one.
NAME = re.compile(r"(?:hf\.co/|https://?huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?(?::([\w.-]+))?")
TEXTS: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TEXTS += ("chat_template.jinja", "chat_template.json", "adapter_config.json")
TOKENIZER_PARTS = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")  # of older models
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HubName(NamedTuple):
    """What a person gives: repository, revision (empty: branch main), file or quantisation of GGUF."""

    repository: str
    revision: str = ""
    file: str = ""

    def __str__(self) -> str:
        revision, file = f"@{self.revision}" * bool(self.revision), f":{self.file}" * bool(self.file)
        return f"{self.repository}{revision}{file}"

    @staticmethod
    def parse(text: str) -> HubName | None:
        """The name in `text`; None where it is no name of the hub, as a path."""
        match = NAME.fullmatch(text)
        if match is None or (text.lower().endswith((".gguf", ".json")) and ":" not in text):
            return None
        return HubName(match[1], match[2] or "", match[3] or "")


def wanted(name: HubName, files: Sequence[str]) -> list[str]:
    """Those of a repository's `files` that an import reads.

    Raises UnsupportedError (pickles only), InputError (no weights, or several models).
    """
    ggufs = sorted(file for file in files if file.lower().endswith(".gguf") and "mmproj" not in file.lower())
    if name.file:
        return chosen_gguf(name, ggufs)
    weights = [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in WEIGHTS)]
    if any(file.endswith(".safetensors") for file in weights):
        if "model.safetensors" in weights:
            weights = [file for file in weights if not file.startswith("model-") and "index" not in file]
        texts = TEXTS if "tokenizer.json" in files else (*TEXTS, *TOKENIZER_PARTS)
        return sorted({*weights, *(file for file in files if file in texts)})
    if ggufs:
        return chosen_gguf(name, ggufs)
    if any(file.endswith(PICKLES) for file in files):
        raise UnsupportedError(
            f"{name.repository} has no safetensors, and a pickle can run code when it is read",
            f"look for a converted copy, or for a pull request of it: {name.repository}@refs/pr/1",
        )
    raise InputError(f"{name.repository} holds no weights that can be read", "choose another model of the hub")


def chosen_gguf(name: HubName, ggufs: Sequence[str]) -> list[str]:
    """The one GGUF model that is meant, all parts of it. Raises InputError where none or several are."""
    meant = [file for file in ggufs if name.file.lower() in PurePosixPath(file).name.lower()]
    exact = [file for file in ggufs if file == name.file]
    # "Q4_K" is also in Q4_K_M: an own word goes first.
    words = [file for file in meant if re.search(rf"(^|[.-]){re.escape(name.file)}(?=[.-])", file, re.IGNORECASE)]
    found = exact or words or meant
    if len(_models(found)) == 1:
        return sorted(found)
    listed = _models(ggufs)
    if not listed:
        raise InputError(f"{name.repository} holds no GGUF files", f"leave :{name.file} out")
    choices = ", ".join(f"{name.repository}:{file}" for file in listed[:20])
    what = f"no one file is named {name.file!r}" if name.file else "it holds several models"
    raise InputError(f"{name.repository}: {what}", f"choose one: {choices}")


def _models(files: Sequence[str]) -> list[str]:
    """The models of GGUF files, each by one name, whatever number of parts it has."""
    return sorted({re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", file) for file in files})
