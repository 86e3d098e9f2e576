"""What a search counts as stored weights against exported bundles: python benchmarks/stored_bytes.py [PRESET ...]

For each public model, target and precision the graph with random weights and the whole context is written to disk. The
primitive graph is written beside it, where a bundle has one. The columns are the count, the
bytes of the data file, those of the graphs too, and how far the count is from the two. The tokenizer and the manifest
are not written. Targets whose rules of storage are the same get the same graph, which is written once. One model at a
time takes up to 2 GB of disk and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from merino_edge import counts
from merino_edge.architecture import Architecture
from merino_edge.presets import preset
from merino_edge.search.reference_models import PUBLIC
from merino_edge.storage import TARGET_RULES, stored_as


def written_bytes(a: Architecture, target_name: str, precision: str, folder: Path) -> tuple[int, int]:
    """Bytes of the data file of a bundle for this target, and of the data file with the graphs."""
    from merino_edge.export.graph import build_stored, save, save_beside
    from merino_edge.export.quantization.stored_weights import random_stored
    from merino_edge.export.targets import Target

    target, graph = Target.named(target_name, precision), folder / "model.onnx"
    stored = random_stored(a, target)
    save(build_stored(a, stored, target, a.max_positions), graph)
    if target.has_fallback:
        fallback = replace(target, lowering="primitive")
        save_beside(build_stored(a, stored, fallback, a.max_positions), folder / "primitive.onnx", graph)
    return graph.with_name("model.onnx.data").stat().st_size, sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=PUBLIC)
    worst: dict[str, float] = {"data": 0.0, "bundle": 0.0}
    print("model", "target", "precision", "counted", "data", "bundle", "data %", "bundle %", sep="\t")
    for name in parser.parse_args().presets:
        a, written = preset(name), {}
        for target, rules in TARGET_RULES.items():
            for precision in rules.precisions:
                counted = counts.weight_bytes(a, precision, target)
                rules_alike = replace(stored_as(precision, target), target=None), rules.tensorrt is None
                if rules_alike not in written:
                    with tempfile.TemporaryDirectory() as folder:
                        written[rules_alike] = written_bytes(a, target, precision, Path(folder))
                data, bundle = written[rules_alike]
                off = {what: 100 * (counted / size - 1) for what, size in (("data", data), ("bundle", bundle))}
                worst = {what: max(worst[what], abs(off[what])) for what in worst}
                errors = (f"{off[what]:+.2f}" for what in worst)
                print(name, target, precision, counted, data, bundle, *errors, sep="\t", flush=True)
    print(f"largest difference: {worst['data']:.2f} % of the data file, {worst['bundle']:.2f} % with the graphs")


if __name__ == "__main__":
    main()
