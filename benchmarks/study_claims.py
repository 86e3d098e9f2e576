"""The claims that matter, on trained models: writes each one's architectures, and prints the study that compares them.

    python benchmarks/study_claims.py OUT [--board orin-nano-8gb --mode 15W] [--precision fp16] [--decode-ms 0.83]
    merino-edge study OUT/depth/study  --corpus TEXT --seeds 3 --model ...      # the printed commands

depth   one layer of 256 against 24 layers of 64, equal weights in the layers (the paper's Table 1, scaled down)
latency what a search finds for a decode step of so many ms, with and without weight sharing, against GPT-2-, OPT-,
        Pythia- and SmolLM-shaped models scaled to that latency on the same table
cuts    equal weights as one width, two widths, a narrow first block, a narrow first block and two widths
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from merino_edge import architecture
from merino_edge.architecture import Architecture, Block
from merino_edge.latency_table import LatencyTable
from merino_edge.search.budget import Metric
from merino_edge.search.draw import decoder_parameters
from merino_edge.search.hand_shaped import SHAPES, largest
from merino_edge.search.prices import Prices
from merino_edge.search.references import value_of
from merino_edge.search.spaces import STUDY

HEAD_DIM, VOCABULARY, EMBEDDING = 32, 2048, 192
WIDTHS = [64, 96, 128, 160, 192, 224, 256]
EQUAL = 786_432  # weights of the layers of one 256-wide layer with an FFN of 1024, and of 24 of 64 and 128
CUTS = {
    "one width": ((128, 4),),
    "two widths": ((96, 2), (160, 2)),
    "narrow first": ((64, 1), (160, 3)),
    "narrow first, two widths": ((64, 1), (128, 2), (192, 1)),
}


def model(*blocks: tuple[int, int, int]) -> Architecture:
    """From (width, layers, ffn_width) of each block, in the study's frame."""
    built = tuple(Block(width, layers, width // HEAD_DIM, width // HEAD_DIM, ffn) for width, layers, ffn in blocks)
    return dataclasses.replace(STUDY.models[0], blocks=built)


def of_equal_size(shape: tuple[tuple[int, int], ...]) -> Architecture:
    """The FFN ratio, in steps of 1/32 of a width, that brings the decoder nearest to EQUAL."""
    candidates = (
        model(*((width, layers, width * ratio // 32) for width, layers in shape)) for ratio in range(16, 32 * 9)
    )
    return min(candidates, key=lambda a: abs(decoder_parameters(a) - EQUAL))


def depth() -> dict[str, Architecture]:
    return {"1x256": model((256, 1, 1024)), "24x64": model((64, 24, 128))}


def cuts() -> dict[str, Architecture]:
    return {name: of_equal_size(shape) for name, shape in CUTS.items()}


def latency(
    folder: Path, board: str, mode: str, precision: str, decode_ms: float, length: int
) -> dict[str, Architecture]:
    """Searched models first; all of them within the same predicted milliseconds on one estimated table."""
    space = folder / "space.json"
    document = {"kind": "space", "schema_version": 2, "name": "latency", "base": "study", "shared": [False, True]}
    document |= {"embedding_widths": [64, 96, 128, 192, 256], "ffn": ["relu", "swiglu"], "kv_groups": [1, 3]}
    document |= {"layers": [1, 2, 3, 4, 6, 8], "widths": WIDTHS, "least_width": 0.5}
    space.write_text(json.dumps(document | {"least_embedding": 0.5}))
    table = folder / "table.jsonl"
    options = ["--board", board, "--precision", precision, "--lengths", f"{length // 2},{length}"]
    _run("estimate", "--space", str(space), "--mode", mode, "--out", str(table), *options)
    found = {}
    for name, more in {
        "searched": ["--no-shared"],
        "searched, shared": ["--shared"],
        "searched by the cut": ["--no-shared", "--score", "cut"],
    }.items():
        out = folder / f"{name}.json"
        budget = ["--table", str(table), "--decode-ms", f"{decode_ms}@{length}"]
        _run("search", "--space", str(space), "--precision", precision, *budget, *more, "--out", str(out))
        found[name] = architecture.load(out)[0]
    metric, prices = Metric("decode_ms", length), Prices(precision, LatencyTable.load(table))
    for shape in SHAPES:
        try:
            found[shape] = largest(
                shape, lambda a: value_of(a, metric, prices)[0], decode_ms, HEAD_DIM, VOCABULARY, length, WIDTHS[-1]
            )
        except Exception as error:
            print(f"{shape}: {error}", file=sys.stderr)
    for name, a in found.items():
        print(f"{name}: {value_of(a, metric, prices)[0]:.4f} ms, {a.parameters:,} parameters", file=sys.stderr)
    return found


def _run(verb: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "merino_edge.cli", verb, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--board", default="orin-nano-8gb")
    parser.add_argument("--mode", default="15W")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--decode-ms", type=float, default=0.83)
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    for claim in ("depth", "latency", "cuts"):
        folder = options.out / claim
        folder.mkdir(parents=True, exist_ok=True)
        if claim == "latency":
            models = latency(folder, options.board, options.mode, options.precision, options.decode_ms, options.context)
        else:
            models = depth() if claim == "depth" else cuts()
        given, seen = [], set[str]()
        for name, a in models.items():
            if a.id in seen:  # two searches may find the same
                continue
            seen.add(a.id)
            architecture.save(folder / f"{name}.json", a)
            given.append(f"--model '{folder / name}.json'")
        print(f"merino-edge study {folder / 'study'} --corpus TEXT --seeds 3 {' '.join(given)}")


if __name__ == "__main__":
    main()
