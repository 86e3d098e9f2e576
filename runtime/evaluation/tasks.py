"""The fourteen zero-shot tasks of the MeRino paper (section 8), over files of a local folder.

Prompts, choices and metrics are those of lm-evaluation-harness. Only the documents come from local files, so nothing
is downloaded. The folder has `lm/` and `eval/`, with each file as its authors publish it or compressed with xz. Two
tasks differ from the harness. `wikitext2` is the word-level text with `<unk>` in articles, and the harness has the raw
text. `ptb` is not in the harness: it is the word-level text in documents of a hundred sentences.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from merino_edge import limits
from merino_edge import names as near_names
from merino_edge.errors import InputError
from merino_edge.packed_text import read_text
from merino_edge.strict_json import parse_bounded

Document = dict[str, Any]
PTB_SENTENCES = 100  # in a document; the file itself has no documents
ARTICLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)


@dataclass(frozen=True)
class LocalTask:
    """One task: the harness's configuration and the local files with its documents."""

    harness: str  # file of the configuration under lm_eval/tasks
    files: tuple[str, ...]  # in the local folder, without .xz
    documents: Callable[..., Iterator[Document]]  # the files' texts -> documents

    def read(self, folder: Path) -> list[Document]:
        """Read all documents. Raises InputError where a file is missing or has another form."""
        try:
            return list(self.documents(*(_text(folder / file) for file in self.files)))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{folder / self.files[0]} has another form than its task reads ({error!r})", "get it again"
            ) from None


def _text(path: Path) -> str:
    packed = path.with_name(f"{path.name}.xz")
    try:
        return read_text(packed if packed.exists() else path, limits.MAX_EVALUATION_BYTES, encoding="utf-8")
    except (OSError, lzma.LZMAError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"cannot read {path} ({reason})", "set MERINO_DATA or --data to the folder of evaluation sets"
        ) from None


def _lines(text: str) -> Iterator[Document]:
    return (parse_bounded(line) for line in text.splitlines() if line.strip())


def _hellaswag(text: str) -> Iterator[Document]:
    for line in _lines(text):
        yield {key: line[key] for key in ("ctx_a", "ctx_b", "activity_label", "endings", "label")}


def _winogrande(text: str) -> Iterator[Document]:
    for line in _lines(text):
        yield {key: line[key] for key in ("sentence", "option1", "option2", "answer")}


def _choices(stem: str) -> Callable[[str], Iterator[Document]]:
    """Multiple-choice questions of AI2; `stem` is the harness's name for the question."""

    def read(text: str) -> Iterator[Document]:
        for line in _lines(text):
            choices = line["question"]["choices"]
            columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
            yield {stem: line["question"]["stem"], "choices": columns, "answerKey": line["answerKey"]}

    return read


def _pubmedqa(text: str, truth: str) -> Iterator[Document]:
    """The official test split, which the second file lists."""
    articles = parse_bounded(text)
    for identity in parse_bounded(truth):
        yield {key: articles[identity][key] for key in ("QUESTION", "CONTEXTS", "final_decision")}


def _logiqa(text: str) -> Iterator[Document]:
    """Eight lines per item: an empty one, right choice, context, question, four options."""
    lines = text.splitlines()
    for _, label, context, question, *options in zip_longest(*[iter(lines)] * 8):
        options = [re.sub(r"^[A-D]\.", "", option).strip() for option in options]
        yield {"label": label.strip(), "context": context.strip(), "question": question.strip(), "options": options}


def _labelled(labels: tuple[Any, ...]) -> Callable[[str], Iterator[Document]]:
    """SuperGLUE; a label becomes its index in `labels`."""

    def read(text: str) -> Iterator[Document]:
        for line in _lines(text):
            yield {**line, **line.pop("target", {}), "label": labels.index(line["label"])}

    return read


def _wikitext(text: str) -> Iterator[Document]:
    starts = [match.start() for match in ARTICLE.finditer(text)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        yield {"page": text[start:end]}


def _ptb(text: str) -> Iterator[Document]:
    lines = text.splitlines()
    for start in range(0, len(lines), PTB_SENTENCES):
        yield {"page": "\n".join(lines[start : start + PTB_SENTENCES])}


_FALSE_TRUE = ("false", "true")

MERINO14 = {
    "wikitext2": LocalTask("wikitext/wikitext.yaml", ("lm/wikitext2_test.txt",), _wikitext),
    "ptb": LocalTask("wikitext/wikitext.yaml", ("lm/ptb_valid.txt",), _ptb),
    "hellaswag": LocalTask("hellaswag/hellaswag.yaml", ("eval/hellaswag_val.jsonl",), _hellaswag),
    "winogrande": LocalTask("winogrande/default.yaml", ("eval/winogrande_dev.jsonl",), _winogrande),
    "openbookqa": LocalTask("openbookqa/openbookqa.yaml", ("eval/openbookqa_dev.jsonl",), _choices("question_stem")),
    "arc_easy": LocalTask("arc/arc_easy.yaml", ("eval/arc_easy_dev.jsonl",), _choices("question")),
    "arc_challenge": LocalTask("arc/arc_challenge.yaml", ("eval/arc_challenge_dev.jsonl",), _choices("question")),
    "pubmedqa": LocalTask(
        "pubmedqa/pubmedqa.yaml", ("eval/pubmedqa_ori_pqal.json", "eval/pubmedqa_test_ground_truth.json"), _pubmedqa
    ),
    "logiqa": LocalTask("logiqa/logiqa.yaml", ("eval/logiqa_eval.txt",), _logiqa),
    "boolq": LocalTask("super_glue/boolq/default.yaml", ("eval/superglue_boolq_val.jsonl",), _labelled(_FALSE_TRUE)),
    "cb": LocalTask(
        "super_glue/cb/default.yaml",
        ("eval/superglue_cb_val.jsonl",),
        _labelled(("entailment", "contradiction", "neutral")),
    ),
    "wic": LocalTask("super_glue/wic/default.yaml", ("eval/superglue_wic_val.jsonl",), _labelled(_FALSE_TRUE)),
    "wsc": LocalTask("super_glue/wsc/default.yaml", ("eval/superglue_wsc_val.jsonl",), _labelled((False, True))),
    "rte": LocalTask(
        "super_glue/rte/default.yaml",
        ("eval/superglue_rte_val.jsonl",),
        _labelled(("entailment", "not_entailment")),
    ),
}


def parse_task_names(names: str) -> list[str]:
    """Parse task names joined by commas; `merino14` stands for all. Raises InputError for an unknown name."""
    tasks = [name for part in names.split(",") for name in (MERINO14 if part == "merino14" else [part])]
    if unknown := [name for name in tasks if name not in MERINO14]:
        raise InputError(f"there is no task {unknown[0]!r}", near_names.choose(unknown[0], MERINO14))
    return list(dict.fromkeys(tasks))


def harness_task(name: str, folder: Path) -> Any:
    """The harness's task `name` with the documents in `folder`. Raises InputError where a file is missing."""
    import datasets
    import lm_eval.tasks
    from datasets.utils.logging import disable_progress_bar
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    disable_progress_bar()
    local = MERINO14[name]
    documents = local.read(folder)
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / local.harness)
    splits = dict.fromkeys(("training_split", "test_split", "fewshot_split")) | {"validation_split": "validation"}
    config |= splits | {
        "task": name,
        "metadata": {},
        "dataset_kwargs": None,
        "custom_dataset": lambda: {"validation": datasets.Dataset.from_list(documents)},
    }
    for unused in ("tag", "dataset_path", "dataset_name"):
        config.pop(unused, None)
    return ConfigurableTask(config=config)
