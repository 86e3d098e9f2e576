"""SmolLM2-135M-Instruct at int4 against llama.cpp, onnxruntime-genai and transformers, from the same GGUF file.

    python benchmarks/peers/compare.py                       # the peers that are installed
    python benchmarks/peers/compare.py --install llama.cpp onnxruntime-genai transformers   # first, into .peers/

Every peer has an environment and a process of its own (`.peers/NAME`; compiling llama-cpp-python takes a quarter
of an hour). In each round every process runs the same prompt and a greedy continuation in turn, and rests meanwhile;
the order alternates. It prints medians over rounds with their spread (1.4826 MAD), and how many times as fast the forms
of our int4 are, round by round. It also prints the largest resident memory, and the mean KL divergence of next-token
distributions from PyTorch float32 over the text of the parity check. llama.cpp has the weights of the file itself;
onnxruntime-genai rounds them by its own builder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from merino_edge import checkpoint
from merino_edge.convert.pretrained import fetch_smollm2
from merino_edge.export.parity import TEXT, mean_kl
from merino_edge.latency.measurement import spread_percent
from merino_edge.pytorch.engine import TorchEngine
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
OURS = {
    "merino-edge": ("--precision", "int4"),
    "merino-edge --fast": ("--precision", "int4", "--fast"),
    "merino-edge --fast --cache int8": ("--precision", "int4", "--fast", "--cache", "int8"),
}
KL_TOKENS = 183  # of the text, all of it
REST_SECONDS = 0.3  # until the threads of the one before have stopped spinning


@dataclass(frozen=True)
class Peer:
    script: str
    packages: tuple[str, ...] = ()


PEERS = {
    **dict.fromkeys(OURS, Peer("ours.py")),
    "llama.cpp": Peer("llama_cpp_peer.py", ("llama-cpp-python",)),
    "onnxruntime-genai": Peer(
        "genai_peer.py", ("onnxruntime-genai", "onnx-ir", "transformers", "torch==2.13.0", "gguf", "accelerate")
    ),
    "transformers": Peer("transformers_peer.py", ("transformers", "torch==2.13.0", "gguf", "accelerate")),
}


class Process:
    """A peer's process (worker.py), started and asked."""

    def __init__(self, python: Path, script: str, model: Path, threads: int) -> None:
        began = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [str(python), str(HERE / script), str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version: str = self._answer()["version"]
        self.load_ms = 1e3 * (time.perf_counter() - began)

    def ask(self, **question: Any) -> dict[str, Any]:
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        print(json.dumps(question), file=stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._process.args} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def python_of(environments: Path, name: str) -> Path:
    return Path(sys.executable) if name in OURS else environments / name / "bin" / "python"


def install(environments: Path, name: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", environments / name], check=True)
    command = [python_of(environments, name), "-m", "pip", "install", "--quiet", *PEERS[name].packages]
    subprocess.run(command, check=True)


def prepare(environments: Path, work: Path, names: Sequence[str], gguf: Path) -> dict[str, Path]:
    """What each peer opens, made where it is not there yet."""
    models = {"llama.cpp": gguf, "onnxruntime-genai": work / "genai-int4", "transformers": work / "huggingface"}
    work.mkdir(parents=True, exist_ok=True)
    cli = [sys.executable, "-m", "merino_edge"]
    if not (work / "checkpoint").exists():
        subprocess.run([*cli, "import", str(gguf), "--out", str(work / "checkpoint")], check=True)
    for name, form in OURS.items():
        models[name] = work / name.replace(" ", "")
        if not models[name].exists():
            command = [*cli, "export", str(work / "checkpoint"), *form, "--out", str(models[name])]
            subprocess.run(command, check=True)
    for name in names:
        python = python_of(environments, name)
        if name in ("transformers", "onnxruntime-genai") and not models["transformers"].exists():
            subprocess.run([python, HERE / "to_huggingface.py", gguf, models["transformers"]], check=True)
        if name == "onnxruntime-genai" and not models[name].exists():
            builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", models["transformers"]]
            options = ["-o", models[name], "-p", "int4", "-e", "cpu", "-c", work / "cache"]
            options += ["--extra_options", "hf_token=false"]
            subprocess.run([*builder, *options], check=True)
    return models


def kl_from_float32(process: Process, reference: np.ndarray, tokens: Sequence[int], work: Path) -> float:
    process.ask(do="logits", tokens=list(tokens), to=str(work / "logits.npy"))
    return float(mean_kl(reference, np.load(work / "logits.npy")))


def float32_logits(path: Path, tokens: Sequence[int]) -> np.ndarray:
    """Those of our PyTorch model, which equals transformers' to 1e-4 (tests/export/test_smollm2.py)."""
    source = checkpoint.load(path)
    engine = TorchEngine(Model.from_weights(source.architecture, source.weights))
    return np.stack([engine.forward(np.array([token]), at).copy() for at, token in enumerate(tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", nargs="+", metavar="PEER", choices=list(PEERS)[len(OURS) :], default=[])
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    environments = options.environments.resolve()
    for name in options.install:
        install(environments, name)
    names = [name for name in PEERS if python_of(environments, name).exists()]
    if len(names) == len(OURS):
        sys.exit("no peer is installed: add --install llama.cpp, onnxruntime-genai or transformers")
    work = environments / "models"
    models = prepare(environments, work, names, fetch_smollm2())

    ids = Tokenizer.load(work / "checkpoint").encode(TEXT)
    prompt = (ids * (options.prompt_tokens // len(ids) + 1))[: options.prompt_tokens]
    processes = {
        name: Process(python_of(environments, name), PEERS[name].script, models[name], options.threads)
        for name in names
    }
    times: dict[str, dict[str, list[float]]] = {name: {"prompt_ms": [], "decode_ms": []} for name in names}
    for number in range(-1, options.rounds):  # the first warms up
        for name in names if number % 2 else names[::-1]:
            time.sleep(REST_SECONDS)
            run = processes[name].ask(do="run", prompt=prompt, new=options.new_tokens)
            if number >= 0:
                for kind, values in times[name].items():
                    values.append(run[kind])
    # Before the logits of every position, which only the comparison of distributions needs.
    peaks = {name: processes[name].ask(do="memory")["peak_mb"] for name in names}
    reference = float32_logits(work / "checkpoint", ids[:KL_TOKENS])
    kls = {name: kl_from_float32(processes[name], reference, ids[:KL_TOKENS], work) for name in names}

    rows = []
    for name in names:
        row: dict[str, Any] = {"peer": name, "version": processes[name].version, "peak_mb": peaks[name]}
        row |= {"kl_from_float32": kls[name], "load_ms": processes[name].load_ms}
        for kind, tokens in (("prompt_ms", options.prompt_tokens), ("decode_ms", options.new_tokens)):
            values, phase = times[name][kind], kind.removesuffix("_ms")
            ratios = {
                ours: [theirs / ms for theirs, ms in zip(values, times[ours][kind], strict=True)] for ours in OURS
            }
            row[f"{phase}_tokens_per_second"] = tokens / statistics.median(values) * 1e3
            row[f"{phase}_spread_percent"] = spread_percent(values)
            row[f"{phase}_ratios"] = {
                ours: [statistics.median(found), min(found), max(found)] for ours, found in ratios.items()
            }
        rows.append(row)
        processes[name].close()
    if options.json:
        print(json.dumps({"threads": options.threads, "rounds": options.rounds, "peers": rows}, indent=2))
        return
    print(f"{options.threads} threads, {options.rounds} rounds, {options.prompt_tokens} + {options.new_tokens} tokens")
    for row in rows:
        print(f"{row['peer']} ({row['version']}): {row['peak_mb']:.0f} MB, KL {row['kl_from_float32']:.4f}")
        for phase in ("prompt", "decode"):
            speed, spread = row[f"{phase}_tokens_per_second"], row[f"{phase}_spread_percent"]
            ratios = (
                f"{ours} {middle:.2f} ({low:.2f} - {high:.2f})"
                for ours, (middle, low, high) in row[f"{phase}_ratios"].items()
            )
            print(f"  {phase:<7} {speed:8.1f} tokens/s, spread {spread:.1f} %; times as fast: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
