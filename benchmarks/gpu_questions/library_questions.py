"""Questions that start libraries and programs: TensorRT, compute-sanitizer, and the tests of the GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from gpu_questions.question import NO, YES, Answer, NotHere, judged, one_line
from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import MerinoError
from merino_edge.weights import random_weights

REPOSITORY = Path(__file__).resolve().parents[2]
CONTEXT = 64
A = Architecture(
    300, CONTEXT, 128, 64, (Block(128, 2, 2, 1, 256),),
    norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=64, bias="none",
)  # fmt: skip
STEPS = ((0, 30), (30, 31), (31, 32), (32, 33), (33, 34))  # a prompt, and steps that are recorded
TOLERANCE = 0.03  # of the largest logit
FOUND_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?")


def tensorrt_engine(library: str) -> Answer:
    """Whether an engine is compiled here, opens, and gives ONNX Runtime's logits, by each lowering."""
    if find_spec(library) is None:
        raise NotHere(f"{library} is not installed")
    from merino_edge.export.graph import build_model, to_bytes
    from merino_edge.export.tensorrt import build_engine
    from merino_edge.runtime.engines.onnx_engine import OnnxEngine
    from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

    trt, _ = tensorrt_library.load(library)
    weights = {name: 4 * weight if weight.ndim > 1 else weight for name, weight in random_weights(A).items()}
    tokens = np.random.default_rng(0).integers(0, A.vocab_size, CONTEXT)
    wrong, right = [], [f"{library} {trt.__version__}"]
    for lowering in ("primitive", "native"):
        try:
            graph = to_bytes(build_model(A, weights, "fp16", CONTEXT, "rtx", lowering=lowering))
            plan = build_engine(library, graph, CONTEXT).plan
            with closing(TensorRtEngine(library, {CONTEXT: plan}, A)) as tried:
                found = [tried.forward(tokens[start:end], start).copy() for start, end in STEPS]
            with closing(OnnxEngine(graph, A, CONTEXT, 1)) as reference:
                wanted = [reference.forward(tokens[start:end], start).copy() for start, end in STEPS]
        except MerinoError as refusal:
            wrong.append(f"{lowering}: {refusal}")
            continue
        error = max(float(np.abs(f - w).max() / np.abs(w).max()) for f, w in zip(found, wanted, strict=True))
        (right if error <= TOLERANCE else wrong).append(f"{lowering} differs by {error:.1e} of the largest logit")
    return judged(wrong, "; ".join(right))


def sanitized(tool: str, command: Sequence[str | Path]) -> Answer:
    """Whether compute-sanitizer finds nothing in `command`, one of our questions in a process of its own."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if program is None:
        raise NotHere("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    done = subprocess.run([program, "--tool", tool, *command], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    counts = [int(first or second) for first, second in FOUND_ERRORS.findall(text)]
    if not counts:
        return Answer(NO, one_line(f"no summary, exit code {done.returncode}: {' '.join(text.split()[-60:])}"))
    if sum(counts):
        marked = [row for row in text.splitlines() if row.startswith("=========")]
        return Answer(NO, one_line(f"{sum(counts)} found: {' '.join(marked)}"))
    if '"answer": "yes"' not in text:  # nothing was found since nothing ran
        return Answer(NO, one_line(f"the kernels did not run: {text}"))
    return Answer(YES, f"{tool} finds nothing in both kernels")


def gpu_tests(folder: str = "tests/gpu") -> Answer:
    """Whether the tests of this folder pass; skipped ones are counted."""
    if find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    command = [sys.executable, "-m", "pytest", folder, "-q", "--maxfail=5", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    summary = re.findall(r"^=*\s*(.*(?:passed|failed|skipped|error).* in .*s\b.*?)\s*=*$", done.stdout, re.M)
    failures = re.findall(r"^(?:FAILED|ERROR|E  ) .*$", done.stdout, re.M)
    passed = done.returncode == 0 and bool(summary) and "passed" in summary[-1]
    text = "; ".join([*summary[-1:], *failures[:4]]) or done.stdout[-300:] + done.stderr[-300:]
    return Answer(YES if passed else NO, one_line(text))
