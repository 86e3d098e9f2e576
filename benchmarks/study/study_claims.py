"""The claims that matter, on trained models: writes each one's architectures, and prints the study that compares them.

    python benchmarks/study/study_claims.py OUT [--board orin-nano-8gb --mode 15W] [--precision fp16] [--decode-ms 0.54]
    merino-edge study OUT/depth/study  --corpus TEXT --seeds 3 --model ...      # the printed commands

The claims:

    depth    one layer of 256 against 24 layers of 64, equal weights in the layers (the paper's Table 1, scaled down)
    latency  what a search finds for a decode step of so many ms, with and without weight sharing, against GPT-2-,
             OPT-, Pythia- and SmolLM-shaped models scaled to that latency on the same table
    cuts     equal weights as one width, two widths, a narrow first block, a narrow first block and two widths
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
from merino_edge.latency.table_file import load_table
from merino_edge.search.budget import Metric
from merino_edge.search.builtin_spaces import STUDY
from merino_edge.search.costs import CostModel
from merino_edge.search.reference_models import value_of
from merino_edge.search.study.baselines import SHAPES, largest
from merino_edge.search.study.sampling import decoder_parameters

TEMPLATE = STUDY.models[0]  # vocabulary, embedding, context and head dimension of all but the searched ones
WIDTHS = [48, 64, 80, 96, 112, 128, 144, 160]
DEEP = {"1x256": (256, 1, 1024), "24x64": (64, 24, 128)}  # (width, layers, ffn_width): as many weights in the layers
EQUAL = 196_608  # decoder parameters of the models with and without cuts
CUTS = {
    "one width": ((64, 4),),
    "two widths": ((48, 2), (80, 2)),
    "narrow first": ((32, 1), (80, 3)),
    "narrow first, two widths": ((32, 1), (64, 2), (96, 1)),
}


def model(*blocks: tuple[int, int, int]) -> Architecture:
    """From (width, layers, ffn_width) of each block, in the study's template."""
    d = TEMPLATE.head_dim
    built = tuple(Block(width, layers, width // d, width // d, ffn) for width, layers, ffn in blocks)
    return dataclasses.replace(TEMPLATE, blocks=built)


def of_equal_size(shape: tuple[tuple[int, int], ...]) -> Architecture:
    """The FFN ratio, in steps of 1/32 of a width, that brings the decoder nearest to EQUAL."""
    candidates = (
        model(*((width, layers, width * ratio // 32) for width, layers in shape)) for ratio in range(16, 32 * 9)
    )
    return min(candidates, key=lambda a: abs(decoder_parameters(a) - EQUAL))


def depth() -> dict[str, Architecture]:
    return {name: model(block) for name, block in DEEP.items()}


def cuts() -> dict[str, Architecture]:
    return {name: of_equal_size(shape) for name, shape in CUTS.items()}


def latency(
    folder: Path, board: str, mode: str, precision: str, decode_ms: float, length: int
) -> dict[str, Architecture]:
    """Searched models first; all of them within the same predicted milliseconds on one estimated table."""
    space = folder / "space.json"
    document = {"kind": "space", "schema_version": 2, "name": "latency", "base": "study", "shared": [False, True]}
    document |= {"embedding_widths": WIDTHS[1:], "ffn": ["relu", "swiglu"], "kv_groups": [1, 3]}
    document |= {"layers": [1, 2, 3, 4, 6, 8], "widths": WIDTHS, "least_width": 0.5}
    # The layers of the tool's own spaces but `paper` and `study`: with learned positions, as the study's have, Pythia's
    # rotary ones would be compared, and not sizes.
    document |= {"model": {"norm": "rmsnorm", "positions": "rotary", "rotary_dim": TEMPLATE.head_dim, "bias": "none"}}
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
    metric, cost_model = Metric("decode_ms", length), CostModel(precision, load_table(table))
    for shape in SHAPES:
        try:
            found[shape] = largest(
                shape,
                lambda a: value_of(a, metric, cost_model)[0],
                decode_ms,
                head_dim=TEMPLATE.head_dim,
                vocab_size=TEMPLATE.vocab_size,
                context=length,
                max_width=WIDTHS[-1],
            )
        except Exception as error:
            print(f"{shape}: {error}", file=sys.stderr)
    for name, a in found.items():
        print(f"{name}: {value_of(a, metric, cost_model)[0]:.4f} ms, {a.parameters:,} parameters", file=sys.stderr)
    return found


def _run(verb: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "merino_edge", verb, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--board", default="orin-nano-8gb")
    parser.add_argument("--mode", default="15W")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--decode-ms", type=float, default=0.54)
    options = parser.parse_args()
    for claim in ("depth", "latency", "cuts"):
        folder = options.out / claim
        folder.mkdir(parents=True, exist_ok=True)
        if claim == "latency":
            models = latency(
                folder, options.board, options.mode, options.precision, options.decode_ms, TEMPLATE.max_positions
            )
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
