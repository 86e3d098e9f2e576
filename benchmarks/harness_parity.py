"""SmolLM2-135M-Instruct by `evaluate` and by the harness's own `hf` backend, item by item.

    merino-edge import smollm2-135m-instruct --out ckpt && merino-edge export ckpt --out smollm2-fp32
    python benchmarks/peers/to_huggingface.py GGUF smollm2-hf        # the same weights as transformers reads them
    MERINO_DATA=DIR python benchmarks/harness_parity.py ckpt smollm2-fp32 smollm2-hf --limit 500

Prints, of every task, the accuracy by each and how many items are answered differently.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from merino_edge.cli.evaluate import open_model
from merino_edge.runtime.evaluation.harness import evaluate_task
from merino_edge.runtime.evaluation.tasks import harness_task

TASKS = ("hellaswag", "arc_easy", "winogrande", "openbookqa", "boolq")


def by_harness(model: Any, task: str, data: Path, limit: int) -> list[float]:
    outcome = evaluate(model, {task: harness_task(task, data)}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    return [float(sample["acc"]) for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="checkpoints and bundles, the transformers folder last")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=500)
    options = parser.parse_args()
    data, *ours, theirs = Path(os.environ["MERINO_DATA"]), *options.models
    hugging = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype="float32").eval()
    reference = HFLM(pretrained=hugging, tokenizer=transformers.AutoTokenizer.from_pretrained(theirs), device="cpu")
    with contextlib.ExitStack() as stack:
        opened = {path: open_model(path, None, cpu=True)[:2] for path in ours}
        for engine, _ in opened.values():
            stack.enter_context(contextlib.closing(engine))
        for task in options.tasks:
            expected = np.array(by_harness(reference, task, data, options.limit))
            print(f"{task:<12} hf {100 * expected.mean():.2f} % of {len(expected)}", flush=True)
            for path, (engine, tokenizer) in opened.items():
                entry = evaluate_task(task, engine, tokenizer, data, limit=options.limit, on_step=lambda done, of: None)
                found = np.array(entry["per_item"]["acc"])
                other = int((found != expected).sum())
                print(
                    f"  {path.name}: {100 * found.mean():.2f} %, {other} items differ, {entry['seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
