"""What rounding the blocks of trained models costs in nats: the constants of merino_edge.search.block_precision.

    python benchmarks/bits_loss.py make MODELS      # writes the architectures; prints the trainings
    python benchmarks/bits_loss.py measure MODELS/A MODELS/B ... --corpus TEXT [--tokens 16384]

Blocks are rounded as `merino-edge export` stores them for ONNX Runtime; embedding and head stay. "nats" is the mean KL
divergence from the model that is not rounded, per token of TEXT, with its standard error over windows. "loss" is the
difference of the loss on TEXT. "estimate" is that of merino_edge.export.sensitivity, from gradients. "blocks alone"
are the KLs with only one block at int4, as shares of the KL with all. Beside each is the block's share of the score.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from merino_edge import architecture, checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.data.corpus import pieces
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.sensitivity import rounding_costs
from merino_edge.export.targets import Target
from merino_edge.pytorch.model import Model
from merino_edge.search.block_precision import NATS_PER_LOG_PARAMETERS
from merino_edge.search.score import DEFAULT, narrowest_cut, parse_score
from merino_edge.tokenizer import Tokenizer
from merino_edge.weights import group_by_input

MODELS = {  # by name: (width, layers, FFN width) of each block
    "64x4": [(64, 4, 160)],
    "128x3": [(128, 3, 352)],
    "64x2-128x2": [(64, 2, 160), (128, 2, 352)],
    "96x6": [(96, 6, 256)],
}
TRAINING = "--steps 900 --batch 16 --sequence 128 --learning-rate 3e-3 --optimizer muon"
SENSITIVITY_TOKENS = 192
WINDOW = 128
CHARACTERS = 6  # of text that are enough for a token
SCORE = parse_score(DEFAULT)
LAYERS = ".layers."  # in the name of every weight of a layer


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, blocks in MODELS.items():
        a = Architecture(
            vocab_size=512,
            max_positions=256,
            embedding_width=64,
            head_dim=32,
            blocks=tuple(Block(width, layers, width // 32, width // 32, ffn) for width, layers, ffn in blocks),
            norm="rmsnorm",
            ffn="swiglu",
            positions="rotary",
            rotary_dim=32,
            bias="none",
        )
        architecture.save(folder / f"{name}.json", a)
        print(f"merino-edge train {folder / name}.json --out {folder / name} --corpus TEXT {TRAINING}")


def log_probabilities(a: Architecture, weights: dict[str, np.ndarray], windows: torch.Tensor) -> torch.Tensor:
    """Of windows [N, W]: [N, W, V]."""
    with torch.inference_mode():
        return Model.from_weights(a, weights).eval()(windows).log_softmax(-1)


class Measured:
    """One checkpoint on windows of text."""

    def __init__(self, path: Path, text: str, tokens: int) -> None:
        self.checkpoint = checkpoint.load(path)
        self.a, self.weights = self.checkpoint.architecture, dict(self.checkpoint.weights)
        ids = Tokenizer.load(path).encode(text[: CHARACTERS * tokens])[:tokens]
        self.windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        self.exact = log_probabilities(self.a, self.weights, self.windows)

    def rounded(self, precision: str, layer: str = LAYERS) -> dict[str, np.ndarray]:
        stored = store(self.a, self.weights, Target.named("onnxruntime", precision)).dequantize()
        return {n: stored[n] if layer in n else weight for n, weight in self.weights.items()}

    def cost(self, precision: str, layer: str = LAYERS) -> tuple[float, float, float]:
        """KL, its standard error, and the difference of losses [nats per token]."""
        got = log_probabilities(self.a, self.rounded(precision, layer), self.windows)
        kl = (self.exact.exp() * (self.exact - got)).sum(-1).mean(-1)  # [N]
        losses = [F.nll_loss(p[:, :-1].flatten(0, 1), self.windows[:, 1:].flatten()) for p in (self.exact, got)]
        return float(kl.mean()), float(kl.std()) / math.sqrt(len(kl)), float(losses[1] - losses[0])

    def estimate(self, precision: str) -> float:
        """The sum over products of what merino_edge.export.sensitivity expects."""
        quantized = store(self.a, self.weights, Target.named("onnxruntime", precision)).quantized
        names = [name for name in quantized if LAYERS in name]
        forms = {unit: [{name: quantized[name] for name in unit}] for unit in group_by_input(names)}
        ids = self.windows.flatten().numpy()[: min(SENSITIVITY_TOKENS, self.a.max_positions)]
        return sum(costs[0] for costs in rounding_costs(self.a, self.weights, forms, ids).values())


def measure(paths: list[Path], corpus: Path, tokens: int) -> None:
    text = ""
    for piece in pieces(corpus):
        text += piece
        if len(text) > CHARACTERS * tokens:
            break
    totals: dict[str, list[float]] = {"int8": [], "int4": []}
    print(
        f"{'model':<14}{'loss':>7}  " + "".join(f"{p + ' nats':>22}{'loss':>10}{'estimate':>10}" for p in totals),
        end="",
    )
    print("   blocks alone")
    for path in paths:
        one = Measured(path, text, tokens)
        loss = F.nll_loss(one.exact[:, :-1].flatten(0, 1), one.windows[:, 1:].flatten())
        line = f"{path.name:<14}{float(loss):7.3f}  "
        for precision, found in totals.items():
            kl, error, difference = one.cost(precision)
            found.append(kl)
            line += f"{kl:12.6f} +-{error:.6f}{difference:10.5f}{one.estimate(precision):10.6f}"
        cut = narrowest_cut(one.a)
        scores = [SCORE.block_total(one.a, block, one.a.layers, cut) for block in one.a.blocks]
        kls = [one.cost("int4", f"blocks.{index}.layers.")[0] for index in range(len(scores))]
        pairs = zip(kls, scores, strict=True)
        line += "   " + " ".join(f"{kl / totals['int4'][-1]:.2f}/{s / sum(scores):.2f}" for kl, s in pairs)
        print(line, flush=True)
    for precision, found in totals.items():
        spread = f"{min(found):.6f} to {max(found):.6f}"
        mean = statistics.fmean(found)
        lost = -math.expm1(-mean / NATS_PER_LOG_PARAMETERS)
        print(f"{precision}: {mean:.6f} nats (range {spread}), {100 * lost:.3f} % of a layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("make").add_argument("folder", type=Path)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("checkpoints", type=Path, nargs="+")
    measuring.add_argument("--corpus", type=Path, required=True)
    measuring.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    if arguments.verb == "make":
        make(arguments.folder)
    else:
        measure(arguments.checkpoints, arguments.corpus, arguments.tokens)


if __name__ == "__main__":
    main()
