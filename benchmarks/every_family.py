"""Exports a tiny random model of every family to every kind of target, and prints a row for each family.

    OMP_NUM_THREADS=1 python benchmarks/every_family.py [--only gemma] [--positions 256] [--lowering primitive]

A cell is the KL divergence [nats] of the exported graph from the imported model, as the export's own check measures it.
For `rtx` the graph is also compiled for SM86 by NVIDIA's compiler, and the cell names the lowering that compiled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.tiny_families import FAMILIES, random_model, save
from merino_edge import checkpoint
from merino_edge.convert.import_model import import_model
from merino_edge.errors import MerinoError
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

TARGETS = ("onnxruntime", "jetpack-6.2", "rtx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="families whose name begins so")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--lowering", default="", help="of every graph; the target's own if not given")
    parser.add_argument("--precisions", nargs="+", default=("fp32", "fp16", "int4"))
    parser.add_argument("--strength", type=float, default=1.5, help="by how much random matrices enlarge their input")
    options = parser.parse_args()
    forms = [(target, precision) for target in options.targets for precision in options.precisions]
    print("| family | " + " | ".join(f"{target} {precision}" for target, precision in forms) + " |")
    print("|---" * (len(forms) + 1) + "|", flush=True)
    refused = 0
    for name in FAMILIES:
        if not name.startswith(options.only):
            continue
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            theirs = random_model(name, options.strength, max_position_embeddings=options.positions)
            a = import_model(save(theirs, Path(folder) / "theirs"), Path(folder) / "ckpt")
            loaded = checkpoint.load(Path(folder) / "ckpt")
            opened = partial(OnnxEngine, threads=1)
            for target, precision in forms:
                try:
                    wanted = ExportOptions(Target.named(target, precision, options.lowering), a.max_positions)
                    written = write_bundle(
                        loaded,
                        Path(folder) / f"{target}-{precision}",
                        wanted,
                        lambda path, capacity: opened(path, a, capacity),  # noqa: B023  (called at once)
                    )
                except MerinoError as error:
                    cells.append(str(error).replace("|", "/"))
                    refused += 1
                    continue
                kl = next(check["value"] for check in written.manifest["parity"] if check["check"] == "mean_kl")
                compiled = written.manifest.get("compiled")
                cells.append(f"{kl:.1e}" + (f", {compiled['lowering']}" if compiled else ""))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
