"""Every verb that writes, with inputs so small that it takes a second. benchmarks/kills.py and faults.py run them.

The verbs run in forks of one process that has imported the libraries. `Verb.again` are the words that a person would
add after an interruption.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import architecture
from merino_edge.architecture import Architecture, Block
from merino_edge.data.tiny_stories import tiny_stories

WARM = (
    "torch",
    "torch._dynamo",
    "safetensors.torch",
    "tokenizers",
    "onnx_ir",
    "onnxruntime",
    "rich.progress",
    "scipy.stats",
    "lm_eval.evaluator",
)
MODULES = (
    *("training.train", "training.study_runs", "export.bundle_writer", "export.parity", "convert.import_model"),
    *("convert.to_huggingface", "distillation.teacher_logits", "distillation.synthetic_corpus", "search.pareto_report"),
    *("search.result", "runtime.engines.onnx_engine", "runtime.evaluation.harness", "runtime.evaluation.perplexity"),
    *("jetson.profiler.profiler", "jetson.estimate.estimate", "search.study.report", "search.study.comparison"),
)
VOLATILE = {  # of runs that are alike
    *("seconds", "train_seconds", "tokens_per_second", "mfu", "sha256", "tool_version", "mtime"),
    *("other_load", "files", "checkpoint_sha256", "teacher_sha256", "start_sha256"),
}
TRAIN = "--corpus {inputs}/corpus.txt --steps 6 --save-every 2 --batch 2 --sequence 16 --threads 1"
BOARD = "--board orin-nano-8gb --mode 15W --space {inputs}/space.json --quick"


@dataclass(frozen=True)
class Verb:
    """`over`: words that replace an output which is there already; None: it is not replaced."""

    name: str
    words: str
    out: str = "out"
    again: str = ""
    over: str | None = None
    old: str = ""  # more words for the output that is replaced
    exact: bool = True  # two runs write the same
    goes_on: bool = False  # what a kill leaves at `out` may be unfinished
    shown: str = ""  # the part of `out` that `show` explains
    given: str = ""  # an input that stands at `out`, and is changed there


VERBS = [
    Verb("import", "import {inputs}/hf --out {out}", over="--force"),
    Verb(
        "train",
        "train {inputs}/a.json " + TRAIN + " --out {out}",
        again="--continue",
        over="--force",
        old="--seed 3",
        goes_on=True,
    ),
    Verb("fine-tune", "train {inputs}/ck " + TRAIN + " --out {out}", again="--continue", goes_on=True),
    Verb("tokenize", "tokenize {inputs}/corpus.txt --vocab 300 --out {out}", again="--continue"),
    Verb(
        "distill generate",
        "distill generate {inputs}/ck --prompts {inputs}/prompts.txt --plain --count 12 --max-tokens 6 --batch 4 "
        "--threads 1 --out {out}",
        out="out.jsonl",
        goes_on=True,
    ),
    Verb(
        "distill logits",
        "distill logits {inputs}/ck --corpus {inputs}/tokens --window 32 --top-k 4 --threads 1 --out {out}",
        goes_on=True,
    ),
    Verb("export", "export {inputs}/ck --threads 1 --out {out}", over="", old="--precision fp16"),
    Verb(
        "export gptq",
        "export {inputs}/ck --precision int4 --rounding gptq --threads 1 --out {out}",
        again="--continue",
        over="",
    ),
    Verb("export-hf", "export-hf {inputs}/ck --out {out}", over="--force"),
    Verb("estimate", "estimate " + BOARD + " --out {out}", out="out.jsonl"),
    Verb("search", "search --space {inputs}/space.json --flops 60G --out {out}", out="out.json", over=""),
    Verb(
        "pareto",
        "pareto --space {inputs}/space.json --against flops --points 4 --out {out}",
        out="out.json",
        again="--continue",
        over="",
    ),
    Verb(
        "evaluate",
        "evaluate {inputs}/bundle --perplexity {inputs}/short.txt --window 16 --threads 1 --out {out}",
        out="out.json",
        again="--continue",
        over="--force",
        goes_on=True,
    ),
    Verb(
        "study",
        "study {out} --corpus {inputs}/corpus.txt --model {inputs}/a.json --model {inputs}/b.json --steps 4 --batch 2 "
        "--sequence 16 --workers 1",
        goes_on=True,
    ),
    Verb(
        "profile",
        "profile --space {inputs}/space.json --minutes 0.01 --lengths 32 --threads 1 --exit-zero --out {out}",
        out="out.jsonl",
        again="--continue",
        exact=False,
        goes_on=True,
    ),
    # TensorRT's compiler does not write the same twice.
    Verb("build", "build {out} --capability SM86", given="for-rtx", over="", exact=False),
    Verb("build threads", "build {out}", given="bundle", over="", exact=False),
    Verb(
        "demo",
        "demo --space {inputs}/space.json --minutes 0.01 --steps 6 --threads 1 --out {out}",
        exact=False,
        goes_on=True,
        shown="bundle",
    ),
]
SPACE = {
    **{"kind": "space", "schema_version": 2, "name": "few", "base": "demo", "blocks": 1, "widths": 64},
    **{"ffn_ratios": [1, 2], "layers": [1, 2, 3], "embedding_widths": 64},
}
TINY = Architecture(
    vocab_size=300,
    max_positions=64,
    embedding_width=32,
    head_dim=16,
    blocks=(Block(32, 2, 2, 1, 64, shared=True),),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=16,
    bias="none",
)
OTHER = Architecture.from_dict({**TINY.to_dict(), "blocks": [{**TINY.to_dict()["blocks"][0], "ffn_width": 96}]})


def warm_up() -> None:
    """Import what the verbs need."""
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for file in sorted(Path(importlib.import_module("merino_edge.cli").__path__[0]).glob("*.py")):
        importlib.import_module(f"merino_edge.cli.{file.stem}")
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"merino_edge.{name}")


def start(words: list[str], log: int, before: Callable[[], None] = lambda: None) -> int:
    """Start a verb in a fork, which calls `before` first, and writes to the open file `log`. Returns its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["merino-edge", *words]
        before()
        from merino_edge.__main__ import run

        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run a verb in a fork to its end. Returns its exit code, or the negative number of the signal that ended it."""
    read, write = os.pipe()  # a limit of the size of files is none of a pipe's, which holds all that a verb says
    pid = start(words, write, before)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.set_blocking(read, False)
    said = b""
    with contextlib.suppress(BlockingIOError), os.fdopen(read, "rb", 0) as pipe:
        while chunk := pipe.read(1 << 16):
            said += chunk
    log.write_bytes(said)
    return code


def words_of(verb: Verb, inputs: Path, out: Path) -> list[str]:
    """The words of the command line."""
    return shlex.split(verb.words.format(inputs=inputs, out=out))


def put(given: Path, out: Path) -> None:
    """Copy a file or a folder."""
    (shutil.copytree if given.is_dir() else shutil.copy)(given, out)


def make_inputs(inputs: Path) -> None:
    """Write what the verbs read."""
    inputs.mkdir(parents=True)
    (inputs / "corpus.txt").write_text(tiny_stories(stories=40))
    (inputs / "short.txt").write_text(tiny_stories(stories=2))
    (inputs / "prompts.txt").write_text("One day the cat\nThe small boat\n")
    (inputs / "space.json").write_text(json.dumps(SPACE))
    architecture.save(inputs / "a.json", TINY)
    architecture.save(inputs / "b.json", OTHER)
    for command in (
        "train {inputs}/a.json " + TRAIN + " --out {inputs}/ck",
        "tokenize {inputs}/corpus.txt --tokenizer {inputs}/ck --out {inputs}/tokens",
        "export {inputs}/ck --threads 1 --out {inputs}/bundle",
        "export-hf {inputs}/ck --out {inputs}/hf",
        "export {inputs}/ck --target rtx --precision fp16 --threads 1 --out {inputs}/for-rtx",
    ):
        log = inputs / "log"
        if run(shlex.split(command.format(inputs=inputs)), log):
            raise SystemExit(f"{command}: {log.read_text()}")
        log.unlink()


def content(path: Path) -> dict[str, Any]:
    """Every file at `path`, without what differs between runs that are alike."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    kept = [file for file in files if file.name != "verified.json"]
    beside = path.with_suffix(".json")  # of a written corpus
    kept += [beside] if path.suffix == ".jsonl" and beside.is_file() else []
    return {str(file.relative_to(path.parent)): _meaning(file) for file in kept}


def _meaning(file: Path) -> Any:
    data = file.read_bytes()
    if file.suffix not in (".json", ".jsonl"):
        return data
    try:
        documents = [json.loads(data)] if file.suffix == ".json" else [json.loads(line) for line in data.splitlines()]
    except ValueError:
        return data
    return [_steady(document) for document in documents]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in VOLATILE}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def leftovers(folder: Path) -> list[str]:
    """Hidden names anywhere in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if re.match(r"\.", path.name))
