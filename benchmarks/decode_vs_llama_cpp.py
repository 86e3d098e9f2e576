"""int4 decode of SmolLM2-135M-Instruct against llama.cpp with the GGUF the bundle was imported from.

One process, both models loaded, the same prompt tokens, greedy, the same number of threads, interleaved rounds whose
order alternates. llama.cpp is driven through its C interface (llama_decode, greedy by numpy), so that no Python wrapper
is on its bill. Prints medians with spread, and the ratio round by round; `--json` prints one object.

    make bench            # or, in an environment with merino-edge[workstation] and llama-cpp-python:
    python benchmarks/decode_vs_llama_cpp.py --rounds 9 --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
import onnxruntime

from merino_edge import bundle, checkpoint
from merino_edge.convert import import_model
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.targets import Target
from merino_edge.pretrained import fetch_smollm2
from merino_edge.runtime.onnx_engine import OnnxEngine
from merino_edge.tokenizer import Tokenizer

CONTEXT = 1024
TEXT = "The quick brown fox jumps over the lazy dog, and then it sits down to think about what it has done. " * 8


class Ours:
    def __init__(self, path: Path, threads: int) -> None:
        self.engine = OnnxEngine.from_bundle(bundle.load(path), threads)

    def run(self, tokens: list[int], start: int) -> int:
        return int(self.engine.forward(np.asarray(tokens, np.int64), start).argmax())


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        self.model = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
        self.context = self.model._ctx.ctx

    def run(self, tokens: list[int], start: int) -> int:
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        vocab = self.model.n_vocab()
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab,)).argmax())


def measure(model: Ours | LlamaCpp, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Tokens per second of one prompt and one greedy continuation."""
    started = time.perf_counter()
    token = model.run(prompt, 0)
    prefilled = time.perf_counter()
    for position in range(len(prompt), len(prompt) + new_tokens):
        token = model.run([token], position)
    done = time.perf_counter()
    return {"prefill": len(prompt) / (prefilled - started), "decode": new_tokens / (done - prefilled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--gguf", type=Path, help="the GGUF file [default: fetch it]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    gguf = options.gguf or fetch_smollm2()
    with tempfile.TemporaryDirectory() as folder:
        import_model(gguf, Path(folder) / "checkpoint")
        source = checkpoint.load(Path(folder) / "checkpoint")
        write_bundle(
            source,
            Path(folder) / "bundle",
            Target.named("onnxruntime", "int4"),
            CONTEXT,
            lambda graph, context: OnnxEngine(graph, source.architecture, context, options.threads),
        )
        prompt = Tokenizer.load(Path(folder) / "bundle").encode(TEXT)[: options.prompt_tokens]
        models = {
            "merino-edge": Ours(Path(folder) / "bundle", options.threads),
            "llama.cpp": LlamaCpp(gguf, options.threads),
        }
        rounds: list[dict[str, dict[str, float]]] = []
        for index in range(-1, options.rounds):  # the first round warms up
            names = list(models) if index % 2 else list(models)[::-1]
            result = {}
            for name in names:
                time.sleep(0.3)  # let the other one's threads stop spinning
                result[name] = measure(models[name], prompt, options.new_tokens)
            if index >= 0:
                rounds.append(result)

    versions = {"onnxruntime": onnxruntime.__version__, "llama-cpp-python": llama_cpp.__version__}
    report: dict[str, object] = {"threads": options.threads, "rounds": len(rounds), "versions": versions}
    for phase in ("prefill", "decode"):
        figures = {name: [r[name][phase] for r in rounds] for name in models}
        ratios = [ours / theirs for ours, theirs in zip(*figures.values(), strict=True)]
        for name, values in {**figures, "ratio": ratios}.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            report[f"{phase} {name}"] = {"median": middle, "min": low, "max": high}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"SmolLM2-135M-Instruct, {options.threads} threads, {len(rounds)} interleaved rounds, {versions}")
    print(
        f"{options.prompt_tokens} prompt tokens, {options.new_tokens} new tokens; tokens per second: median (min - max)"
    )
    for name, value in report.items():
        if isinstance(value, dict) and "median" in value:
            print(f"  {name:22} {value['median']:8.2f}  ({value['min']:.2f} - {value['max']:.2f})")


if __name__ == "__main__":
    main()
