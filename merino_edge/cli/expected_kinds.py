"""Which kinds of artefact each verb takes, so that a wrong one is named before the verb begins.

merino_edge.wrong_kind says what a path is and which command comes next. The loaders still verify what passes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merino_edge import wrong_kind

BUNDLE, CHECKPOINT, ARCHITECTURE, TABLE = ("bundle",), ("checkpoint",), ("architecture",), ("latency_table",)
MODEL = ("bundle", "checkpoint", "gguf", "huggingface")  # what is no bundle is made ready first
CORPUS = ("corpus", wrong_kind.TEXT)
# By verb, then by parameter.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "profile": {"like": TABLE},
    "search": {"table": TABLE, "repeat": ARCHITECTURE},
    "pareto": {"table": TABLE},
    "verify": {"result": ARCHITECTURE, "table": TABLE},
    "study": {"folder": ("study",), "model": ARCHITECTURE, "corpus": CORPUS},
    "tokenize": {"sources": (wrong_kind.TEXT,), "tokenizer": ("checkpoint", "bundle")},
    "train": {
        "model": ("architecture", "checkpoint"),
        "corpus": CORPUS,
        "teacher": ("checkpoint", "teacher_logits"),
    },
    "run": {"model": MODEL},
    "generate": {"bundle": MODEL, "draft": BUNDLE},
    "distill generate": {"teacher": CHECKPOINT},
    "distill logits": {"teacher": CHECKPOINT, "corpus": ("corpus",)},
    "evaluate": {"model": ("checkpoint", "bundle"), "against": ("evaluation",)},
    "import": {"source": ("huggingface", "gguf")},
    "export": {"checkpoint": CHECKPOINT, "bits_of": ARCHITECTURE},
    "export-hf": {"checkpoint": CHECKPOINT},
    "build": {"bundle": BUNDLE},
    "serve": {"bundle": MODEL, "draft": BUNDLE},
    "bench": {"bundle": MODEL, "against": MODEL},
    "show": {"against": TABLE},
}


def check(verb: str, parameters: Mapping[str, Any]) -> None:
    """Raise ArtefactError where a parameter of `verb` names an artefact of a kind that the verb does not take.

    What is missing passes: it may be a name, or a folder to write. Its loader knows.
    """
    from merino_edge import names

    for parameter, wanted in EXPECTED.get(verb, {}).items():
        value = parameters.get(parameter)
        for given in [value] if isinstance(value, (str, Path)) else value or ():
            if not names.is_missing(Path(given)) and not _is_model(verb, given):
                wrong_kind.require(Path(given), *wanted)


def _is_model(verb: str, given: str | Path) -> bool:
    """Whether `import` fetches a model of this name, whatever lies in a folder of the same."""
    if verb != "import":
        return False
    from merino_edge.convert import pretrained

    return pretrained.is_name(str(given))
