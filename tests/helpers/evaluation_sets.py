"""Small evaluation sets for tests: about four items each, in the form that the authors publish."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

_WIKITEXT = """ \n = Owls = \n \n Owls hunt at night . \n \n = = Food = = \n \n Mice . \n
 = Bees = \n \n Bees <unk> . \n"""
_PEOPLE = ("Ada", "Ben", "Cleo", "Dan")


def _question(number: int) -> dict[str, Any]:
    choices = [{"text": f"{name} did", "label": label} for name, label in zip(_PEOPLE, "ABCD", strict=True)]
    return {
        "id": f"q{number}",
        "question": {"stem": f"Who opened door {number}?", "choices": choices},
        "answerKey": "ABCD"[number % 4],
    }


def _hellaswag(number: int) -> dict[str, Any]:
    return {
        "ind": number,
        "ctx_a": f"{_PEOPLE[number % 4]} takes {number + 2} eggs.",
        "ctx_b": "then she",
        "ctx": "",
        "activity_label": "Cooking [title]",
        "endings": [f"breaks {n} of them [substeps] slowly." for n in range(4)],
        "label": number % 4,
    }


def _winogrande(number: int) -> dict[str, str]:
    sentence = f"{_PEOPLE[number % 4]} thanked the baker because _ had baked {number} loaves."
    return {"sentence": sentence, "option1": _PEOPLE[number % 4], "option2": "the baker", "answer": "2"}


def _wsc(number: int) -> dict[str, Any]:
    target = {"span1_text": "Ada", "span1_index": 0, "span2_text": "she", "span2_index": 4}
    text = f"Ada told Cleo that she had won {number} times."
    return {"text": text, "target": target, "idx": number, "label": number % 2 == 0}


def _wic(number: int) -> dict[str, Any]:
    return {
        "word": "bank", "sentence1": f"The bank lent {number} coins.", "sentence2": "We sat on the bank.",
        "idx": number, "label": "false", "start1": 4, "end1": 8, "start2": 14, "end2": 18,
    }  # fmt: skip


def _pair(number: int, label: str) -> dict[str, Any]:
    return {"premise": f"It rained for {number} days.", "hypothesis": "It was dry.", "idx": number, "label": label}


def _lines(items: list[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def write_sets(folder: Path) -> Path:
    """Write all files of merino_edge.runtime.evaluation.tasks.MERINO14, one of them compressed."""
    count = range(4)
    logiqa = "".join(
        f"\n{'abcd'[i]}\nAll {i + 3} doors are shut.\nWhich is open?\n"
        + "".join(f"{letter}.Door {letter}.\n" for letter in "ABCD")
        for i in count
    )
    pubmed = {
        str(i): {"QUESTION": f"Does {i} help?", "CONTEXTS": ["It may.", "It did."], "final_decision": "yes"}
        for i in count
    }
    texts = {
        "lm/wikitext2_test.txt": _WIKITEXT,
        "lm/ptb_valid.txt": "".join(f" the index rose N points on day {i} \n" for i in range(250)),
        "eval/winogrande_dev.jsonl": _lines([_winogrande(i) for i in count]),
        "eval/openbookqa_dev.jsonl": _lines([_question(i) for i in count]),
        "eval/arc_easy_dev.jsonl": _lines([_question(i) for i in count]),
        "eval/arc_challenge_dev.jsonl": _lines([_question(i + 1) for i in count]),
        "eval/pubmedqa_ori_pqal.json": json.dumps(pubmed),
        "eval/pubmedqa_test_ground_truth.json": json.dumps({"1": "yes", "3": "yes"}),
        "eval/logiqa_eval.txt": logiqa,
        "eval/superglue_boolq_val.jsonl": _lines(
            [{"question": "is it wet", "passage": f"Rain {i}.", "idx": i, "label": "true"} for i in count]
        ),
        "eval/superglue_cb_val.jsonl": _lines([_pair(i, "neutral") for i in count]),
        "eval/superglue_wic_val.jsonl": _lines([_wic(i) for i in count]),
        "eval/superglue_wsc_val.jsonl": _lines([_wsc(i) for i in count]),
        "eval/superglue_rte_val.jsonl": _lines([_pair(i, "not_entailment") for i in count]),
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    packed = lzma.compress(_lines([_hellaswag(i) for i in count]).encode())
    (folder / "eval" / "hellaswag_val.jsonl.xz").write_bytes(packed)
    return folder
