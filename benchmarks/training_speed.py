"""Training against plain loops: tokens a second in turns, and the loss after equal steps from equal weights.

    python benchmarks/training_speed.py [--corpus FILE] [--steps 200] [--precision fp32] [--threads 2]

Three trainings of one Llama-shaped model on the same batches: `merino-edge train`'s, a plain PyTorch loop around the
same module, and a plain loop around transformers' LlamaForCausalLM, which begins with the same weights by export-hf.
They take turns, a step each, and a ratio is the median over turns. Without a corpus the built-in stories are read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.convert.to_huggingface import export_to_huggingface
from merino_edge.data.corpus import Corpus, prepare
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.latency.measurement import spread_percent
from merino_edge.pytorch.model import Model
from merino_edge.training.config import TrainingConfig
from merino_edge.training.trainer import Trainer

A = Architecture(
    2048, 256, 256, 32, (Block(256, 6, 8, 4, 768),),
    norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=32, bias="none",
)  # fmt: skip


class PlainLoop:
    """What a person writes: AdamW, clipping, the schedule, autocast. `loss_of(inputs, targets)` is the mean loss."""

    def __init__(self, module: nn.Module, corpus: Corpus, config: TrainingConfig, bf16: bool) -> None:
        self.module, self.corpus, self.config, self.bf16, self.step = module, corpus, config, bf16, 0
        groups = [
            {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)

    def logits(self, inputs: Tensor) -> Tensor:
        found = self.module(inputs)
        return found if isinstance(found, Tensor) else found.logits  # transformers' output

    def train_step(self) -> float:
        c = self.config
        inputs, targets = map(torch.from_numpy, self.corpus.batch(self.step, c.batch, c.sequence, c.seed))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.logits(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), c.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate_at(self.step)
        self.optimizer.step()
        self.step += 1
        return loss.item()


def loops(corpus: Corpus, config: TrainingConfig, a: Architecture = A) -> dict[str, Callable[[], float]]:
    """Each training's next step, by name; all begin with the same weights."""
    ours = Trainer(a, corpus, config)
    plain = Model(a, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        weights, chat = ours.model.to_weights(), corpus.chat
        checkpoint.save(
            Path(folder) / "c",
            a,
            weights,
            tokenizer_json=corpus.tokenizer_json,
            chat=chat,
            training={"source": "random"},
        )
        export_to_huggingface(Path(folder) / "c", Path(folder) / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32).train()
    return {
        "merino-edge": ours.train_step,
        "plain loop": PlainLoop(plain, corpus, config, ours.bf16).train_step,
        "transformers": PlainLoop(theirs, corpus, config, ours.bf16).train_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainingConfig(
        steps=options.steps, batch=8, sequence=256, micro_batch=8, learning_rate=1e-3, warmup=20,
        precision=options.precision,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = options.corpus
        if source is None:
            source = Path(folder) / "stories.txt"
            source.write_text(tiny_stories())
        steps = loops(prepare([source], A.vocab_size, Path(folder) / "corpus"), config)
        speeds: dict[str, list[float]] = {name: [] for name in steps}
        losses = dict.fromkeys(steps, 0.0)
        for turn in range(options.steps):
            first = turn % len(steps)
            for name in [*steps, *steps][first : first + len(steps)]:
                began = time.perf_counter()
                losses[name] = steps[name]()
                speeds[name].append(config.tokens_per_step / (time.perf_counter() - began))
    for name, mine in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speeds["merino-edge"], mine, strict=True))
        print(
            f"{name:<14} {statistics.median(mine):8,.0f} tokens/s, spread {spread_percent(mine):4.1f} %; "
            f"merino-edge {ratio:.3f} x; loss after {options.steps} steps {losses[name]:.5f}"
        )


if __name__ == "__main__":
    main()
