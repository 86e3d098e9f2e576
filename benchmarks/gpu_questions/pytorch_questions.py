"""Questions about PyTorch on the GPU: its engine beside the CPU's, one context with ours, the speed of training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from gpu_questions.parts import comes_back, opened
from gpu_questions.question import Answer, NotHere, judged
from merino_edge.architecture import Architecture, Block
from merino_edge.presets import preset
from merino_edge.weights import random_weights

SMALL = Architecture(
    4096, 512, 512, 64, (Block(512, 4, 8, 2, 1536), Block(640, 2, 10, 5, 1280, shared=True)),
    norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=64, bias="none",
)  # fmt: skip
STEPS = ((0, 300), (300, 301), (301, 302), (20, 21), (21, 40))  # the later ones rewind
TOLERANCES = {"fp32": 1e-4, "fp16": 0.03}  # of the largest logit
TOKENS = 50  # timed steps
TIMED_STEPS, FIRST_STEPS = 10, 3


def require_gpu() -> None:
    """Raises NotHere where this PyTorch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NotHere(f"PyTorch {torch.__version__} finds no GPU")


def shared_context() -> Answer:
    """Whether our calls see PyTorch's memory, and PyTorch goes on after ours are closed."""
    require_gpu()
    import torch

    numbers = torch.arange(1000, dtype=torch.float32, device="cuda")
    torch.cuda.synchronize()
    found, wrong = np.zeros(1000, np.float32), []
    with opened() as cuda:
        cuda.to_host(numbers.data_ptr(), found)
        cuda.synchronize()
        wrong += [] if comes_back(cuda) else ["our own memory gives other values"]
    wrong += [] if np.array_equal(found, np.arange(1000)) else ["PyTorch's memory reads as other values"]
    wrong += [] if float((numbers + 1).sum()) == 500_500 else ["PyTorch computes other values afterwards"]
    return judged(wrong, "PyTorch's memory is ours too, and it goes on after close")


def engine(device: str = "cuda", a: Architecture = SMALL, steps: Sequence[tuple[int, int]] = STEPS) -> Answer:
    """Whether the PyTorch engine on `device` computes what it computes on the CPU; and its ms for a token."""
    if device == "cuda":
        require_gpu()
    from merino_edge.pytorch.engine import TorchEngine
    from merino_edge.pytorch.model import Model

    weights = random_weights(a)
    tokens = np.random.default_rng(0).integers(0, a.vocab_size, a.max_positions)
    with closing(TorchEngine(Model.from_weights(a, weights))) as reference:
        wanted = [reference.forward(tokens[start:end], start).copy() for start, end in steps]
    wrong, right = [], []
    for precision, tolerance in TOLERANCES.items():
        with closing(TorchEngine(Model.from_weights(a, weights), precision, device=device)) as tried:
            found = [tried.forward(tokens[start:end], start).copy() for start, end in steps]
            began, last = time.perf_counter(), steps[0][1]
            tried.mark_filled(last)
            for _ in range(TOKENS):
                tried.forward(tokens[:1], last)
            ms = 1000 * (time.perf_counter() - began) / TOKENS
        error = max(float(np.abs(f - w).max() / np.abs(w).max()) for f, w in zip(found, wanted, strict=True))
        text = f"{precision} differs by {error:.1e} of the largest logit, {ms:.2f} ms a token"
        (right if error <= tolerance else wrong).append(text)
    return judged(wrong, "; ".join(right))


class RandomTokens:
    """In a prepared corpus's place: batches of random tokens, which take as long as others."""

    sha256 = ""

    def __init__(self, vocab_size: int) -> None:
        self.header = {"tokenizer_tokens": vocab_size}
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, 1 << 20)

    def starts(self, step: int, size: int, sequence: int, seed: int) -> Any:
        return np.random.default_rng([seed, step]).integers(0, len(self.tokens) - sequence - 1, size=size)

    def rows(self, starts: Any, sequence: int) -> tuple[Any, Any]:
        rows = np.stack([self.tokens[start : start + sequence + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]


def training(a: Architecture | None = None, *, batch: int = 64, sequence: int = 1024, micro_batch: int = 16) -> Answer:
    """MFU [%] of the preset merino-64m in bf16, as `train` trains it: of the largest rate of a matrix product here."""
    a = a or _on_gpu("merino-64m")
    seconds, _, peak = _trained(a, batch, sequence, micro_batch, compiled=False)
    from merino_edge.training import throughput
    from merino_edge.training.device import device

    tokens_per_s = batch * sequence / seconds
    most = throughput.matmul_flops_per_second(device(), bf16=True)
    rate = throughput.training_flops_per_token(a, sequence) * tokens_per_s
    return Answer(
        round(100 * rate / most, 1),
        f"{a.parameters / 1e6:.0f} M parameters: {tokens_per_s:,.0f} tokens/s, {rate / 1e12:.1f} TFLOP/s of "
        f"{most / 1e12:.0f} of a matrix product; batch {batch} in micro-batches of {micro_batch}, {peak}",
    )


def compiling(a: Architecture | None = None, *, batch: int = 64, sequence: int = 1024, micro_batch: int = 16) -> Answer:
    """How many times as fast training is with torch.compile, without the seconds that it compiles."""
    a = a or _on_gpu("merino-64m")
    plain_s, _, plain_peak = _trained(a, batch, sequence, micro_batch, compiled=False)
    compiled_s, first_s, peak = _trained(a, batch, sequence, micro_batch, compiled=True)
    return Answer(
        round(plain_s / compiled_s, 3),
        f"{1000 * plain_s:.0f} ms a step without it ({plain_peak}), {1000 * compiled_s:.0f} ms with it ({peak}), "
        f"after {first_s:.0f} s",
    )


def _on_gpu(name: str) -> Architecture:
    require_gpu()
    return preset(name)


def _trained(
    a: Architecture, batch: int, sequence: int, micro_batch: int, *, compiled: bool
) -> tuple[float, float, str]:
    """Seconds of the median step, seconds of the first steps, and the peak memory as text."""
    import torch

    from merino_edge.training.config import TrainingConfig
    from merino_edge.training.trainer import Trainer

    corpus: Any = RandomTokens(a.vocab_size)
    config = TrainingConfig(
        steps=1000, batch=batch, sequence=sequence, micro_batch=micro_batch, warmup=100, precision="bf16"
    )
    trainer = Trainer(a, corpus, config, compiled=compiled)
    times = []
    for _ in range(FIRST_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        trainer.train_step()  # it reads the loss, and so it waits for the GPU
        times.append(time.perf_counter() - began)
    if trainer.device.type != "cuda":
        return float(np.median(times[FIRST_STEPS:])), sum(times[:FIRST_STEPS]), "on the CPU"
    peak = f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    del trainer
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float(np.median(times[FIRST_STEPS:])), sum(times[:FIRST_STEPS]), peak
