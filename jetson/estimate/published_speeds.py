"""Published decode and prefill speeds of small models on Jetson boards, and the roofline's errors against them.

| source | setup |
|---|---|
| llama.cpp b9292, Ollama 0.24.0 | Orin Nano 8GB Super, L4T r36.4.7, prompt 2048, 256 generated, clocks locked [1] |
| TensorRT Edge-LLM 0.9.0 | JetPack 7.2, prompt of 61 tokens; its docs/source/user_guide/performance |
| MLC, INT4 | Orin Nano 8GB before and with Super; NVIDIA's announcement of Super [2] |
| BF16 | AGX Orin; embedl's benchmark table on Hugging Face |

Only the first source states its power modes. Assumed are, for Edge-LLM, no Super on the Orin Nano and MAXN elsewhere;
for MLC 15W before Super and MAXN_SUPER with it; for BF16 MAXN. Left out are models that an Architecture cannot express
(LFM2.5, Gemma, Qwen3.5), speculative decoding, figures without a setup and 1-bit models. No speed of this tool's own
TensorRT engines is published.

    [1] https://www.smolhub.com/posts/jetson-nano-super-benchmark-non-reasoning/
        all modes (tables 9 and 10): https://github.com/YuvrajSingh-mist/smolperfbenchmark
    [2] https://github.com/msmcs-robotics/WayfindR-driver, docs/jetson_orin_nano_llm_benchmarks.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merino_edge.architecture import Architecture, Bias, Block
from merino_edge.jetson.estimate.boards import board
from merino_edge.jetson.estimate.roofline import (
    BF16,
    INT4_AWQ,
    MLC_INT4,
    NVFP4,
    Q4_K_M,
    Q4_K_M_NARROW,
    Q8_0,
    Roofline,
    Runtime,
    Storage,
    runtime,
)
from merino_edge.jetson.profiler.validation import error_figures
from merino_edge.latency.measurement import MODES, Mode
from merino_edge.presets import preset

OWN = "merino-edge"  # the runtime
PUBLISHERS = {
    "llama.cpp": "smolhub.com",
    "ollama": "smolhub.com",
    "edge-llm": "NVIDIA, TensorRT Edge-LLM's documents",
    "mlc": "NVIDIA, announcement of Super",
    "bf16": "embedl",
}
SMOLHUB_LENGTH = 2048 + 256 // 2  # cache positions, on average
SHORT_LENGTH = 128  # assumed for the others, where the cache hardly counts
EDGE_LLM_PROMPT = 61


@dataclass(frozen=True)
class PublishedSpeed:
    """One published speed. `fitted` says that constants of `runtime` were chosen on it, so it is no test."""

    framework: str
    model: str
    architecture: Architecture
    storage: Storage
    board: str
    power_mode: str
    mode: Mode
    length: int
    tokens_per_s: float
    runtime: str  # its constants predict the speed
    fitted: bool = False

    def predicted_tokens_per_s(self, constants: Runtime | None = None) -> float:
        """The roofline's speed, with other `constants` than the runtime's if given."""
        on = board(self.board)
        roofline = Roofline(on, on.mode(self.power_mode), constants or runtime(self.runtime))
        tokens = 1 if self.mode == "decode" else self.length
        return 1000 * tokens / roofline.step_ms(self.architecture, self.mode, self.length, self.storage)

    def to_dict(self) -> dict[str, Any]:
        """The speed, its prediction and the error as a JSON object."""
        predicted = self.predicted_tokens_per_s()
        names = ("framework", "model", "board", "power_mode", "mode", "length", "runtime", "fitted")
        return {
            **{name: getattr(self, name) for name in names},
            "storage": self.storage.name,
            "published_tokens_per_s": self.tokens_per_s,
            "predicted_tokens_per_s": predicted,
            "error_percent": 100 * (predicted / self.tokens_per_s - 1),
        }


def _llama_like(block: Block, vocab_size: int, *, embedding_width: int = 0, bias: Bias = "none") -> Architecture:
    head_dim = block.width // block.heads
    return Architecture(
        vocab_size=vocab_size,
        max_positions=8192,
        embedding_width=embedding_width or block.width,
        head_dim=head_dim,
        blocks=(block,),
        norm="rmsnorm",
        ffn="swiglu",
        positions="rotary",
        rotary_dim=head_dim,
        bias=bias,
    )


# Shapes from the models' own config.json.
SMOLLM2_135M = preset("smollm2-135m")
SMOLLM2_360M = _llama_like(Block(960, 32, 15, 5, 2560), 49152)
QWEN25_05B = _llama_like(Block(896, 24, 14, 2, 4864), 151936, bias="qkv")
LLAMA32_1B = _llama_like(Block(2048, 16, 32, 8, 8192), 128256)
QWEN3_17B = _llama_like(Block(2048, 28, 16, 8, 6144), 151936)
# Qwen3-0.6B's heads are together twice as wide (2048) as its residual stream, which an Architecture cannot say. This
# one has the same cache, attention and head; its FFN is narrower (512, not 3072) so that layers have as many weights.
QWEN3_06B = _llama_like(Block(2048, 28, 16, 8, 512), 151936, embedding_width=1024)

SMOLLM2_17B = _llama_like(Block(2048, 24, 32, 32, 8192), 49152)
LLAMA32_3B = _llama_like(Block(3072, 28, 24, 8, 8192), 128256)
QWEN25_7B = _llama_like(Block(3584, 28, 28, 4, 18944), 152064, bias="qkv")
LLAMA31_8B = _llama_like(Block(4096, 32, 32, 8, 14336), 128256)

SMOLHUB_MODES = ("7W", "15W", "25W", "MAXN_SUPER")
# (model, shape, storage, tokens/s of llama.cpp by mode, of Ollama by mode)
_SMOLHUB = (
    ("SmolLM2-135M", SMOLLM2_135M, Q4_K_M_NARROW, (53.8, 114.7, 165.2, 159.5), (36.4, 84.4, 120.6, 132.2)),
    ("SmolLM2-360M", SMOLLM2_360M, Q8_0, (34.9, 70.6, 102.2, 89.6), (21.0, 48.5, 69.9, 76.4)),
    ("Qwen2.5-0.5B", QWEN25_05B, Q4_K_M_NARROW, (27.5, 68.5, 92.9, 100.6), (16.5, 39.4, 55.6, 61.2)),
    ("Qwen3-0.6B", QWEN3_06B, Q8_0, (14.2, 33.9, 49.4, 54.3), (14.0, 32.5, 46.7, 51.3)),
    ("Llama-3.2-1B", LLAMA32_1B, Q4_K_M, (12.1, 32.3, 47.1, 51.9), (11.8, 31.2, 44.8, 49.9)),
)
_SMOLHUB_FITTED = {*(("SmolLM2-135M", mode) for mode in ("7W", "15W", "25W")),
                   ("Qwen3-0.6B", "15W"), ("Llama-3.2-1B", "15W")}  # fmt: skip
# (model, shape, storage, board, power mode taken, decode tokens/s, prefill tokens/s)
_EDGE_LLM = (
    ("Qwen3-0.6B", QWEN3_06B, INT4_AWQ, "orin-nano-8gb", "15W-nosuper", 72.8, 2133.0),
    ("Qwen3-1.7B", QWEN3_17B, INT4_AWQ, "orin-nano-8gb", "15W-nosuper", 37.4, 970.0),
    ("Qwen3-0.6B", QWEN3_06B, INT4_AWQ, "orin-nx-16gb", "MAXN", 117.4, None),
    ("Qwen3-1.7B", QWEN3_17B, INT4_AWQ, "orin-nx-16gb", "MAXN", 60.4, None),
    ("Qwen3-0.6B", QWEN3_06B, INT4_AWQ, "agx-orin-64gb", "MAXN", 186.4, None),
    ("Qwen3-1.7B", QWEN3_17B, INT4_AWQ, "agx-orin-64gb", "MAXN", 98.6, None),
    ("Qwen3-0.6B", QWEN3_06B, NVFP4, "agx-thor", "max", 303.1, None),
    ("Qwen3-1.7B", QWEN3_17B, NVFP4, "agx-thor", "max", 154.2, None),
)
# (model, shape, tokens/s before Super, with Super)
_MLC = (
    ("SmolLM2-1.7B", SMOLLM2_17B, 41.0, 64.5),
    ("Llama-3.2-3B", LLAMA32_3B, 27.7, 43.07),
    ("Qwen2.5-7B", QWEN25_7B, 14.2, 21.75),
    ("Llama-3.1-8B", LLAMA31_8B, 14.0, 19.14),
)


def rows() -> list[PublishedSpeed]:
    """Every published speed that the roofline can express."""
    published = []
    for name, a, storage, llama_cpp, ollama in _SMOLHUB:
        for framework, speeds in (("llama.cpp", llama_cpp), ("ollama", ollama)):
            for power_mode, speed in zip(SMOLHUB_MODES, speeds, strict=True):
                fitted = (name, power_mode) in _SMOLHUB_FITTED
                # the clock factor in MAXN_SUPER
                fitted |= (framework, name, power_mode) == ("llama.cpp", "SmolLM2-135M", "MAXN_SUPER")
                where = (framework, name, a, storage, "orin-nano-8gb", power_mode)
                published.append(PublishedSpeed(*where, "decode", SMOLHUB_LENGTH, speed, framework, fitted))
    for name, a, storage, at, power_mode, decode, prefill in _EDGE_LLM:
        where = ("edge-llm", name, a, storage, at, power_mode)
        published.append(PublishedSpeed(*where, "decode", SHORT_LENGTH, decode, "edge-llm", at == "orin-nano-8gb"))
        if prefill:
            published.append(
                PublishedSpeed(*where, "prefill", EDGE_LLM_PROMPT, prefill, "edge-llm", name == "Qwen3-0.6B")
            )
    for name, a, before, with_super in _MLC:
        for power_mode, speed in (("15W-nosuper", before), ("MAXN_SUPER", with_super)):
            where = ("mlc", name, a, MLC_INT4, "orin-nano-8gb", power_mode)
            published.append(PublishedSpeed(*where, "decode", SHORT_LENGTH, speed, "edge-llm"))
    where = ("bf16", "Llama-3.2-1B", LLAMA32_1B, BF16, "agx-orin-64gb", "MAXN")
    published.append(PublishedSpeed(*where, "decode", SHORT_LENGTH, 65.0, "edge-llm"))
    return sorted(published, key=lambda row: (row.framework, row.mode))


def unfitted_errors_percent(runtime_name: str, mode: Mode) -> list[float]:
    """The errors, ascending, of a runtime's predictions against published speeds that no constant was fitted to.

    A measured time lies as far from its prediction. This tool's own runtime has Edge-LLM's constants.
    """
    return sorted(100 * (row.predicted_tokens_per_s() / row.tokens_per_s - 1) for row in _unfitted(runtime_name, mode))


def checked_by(runtime_name: str, board_name: str) -> list[str]:
    """Who measured what such an estimate is compared with, a line for each mode, and what nobody measured."""
    lines = []
    for mode in MODES:
        tested = _unfitted(runtime_name, mode)
        here = Counter(row.framework for row in tested if row.board == board_name)
        shown = "; ".join(f"{count} of {name} by {PUBLISHERS[name]}" for name, count in here.items())
        counted = f"{here.total()} on this board" + (f" ({shown})" if shown else "")
        lines.append(f"{mode} is compared with published speeds: {counted}, {len(tested) - here.total()} on others")
    if runtime_name == OWN:
        lines.append(f"no speed of {OWN} on this board was measured by anybody")
    return lines


def _unfitted(runtime_name: str, mode: Mode) -> list[PublishedSpeed]:
    constants = "edge-llm" if runtime_name == OWN else runtime_name
    return [row for row in rows() if (row.runtime, row.mode, row.fitted) == (constants, mode, False)]


def summaries(compared: Sequence[PublishedSpeed]) -> list[dict[str, Any]]:
    """The errors for each framework and mode, over all rows and over those that nothing was fitted to.

    {"framework", "mode", "rows": "all" or "tested", and the keys of `validation.error_figures`}
    """
    summarised = []
    for framework, mode in dict.fromkeys((row.framework, row.mode) for row in compared):
        every = [row for row in compared if (row.framework, row.mode) == (framework, mode)]
        for which, group in (("all", every), ("tested", [row for row in every if not row.fitted])):
            if group:
                pairs = [(row.predicted_tokens_per_s(), row.tokens_per_s) for row in group]
                summarised.append({"framework": framework, "mode": mode, "rows": which, **error_figures(pairs)})
    return summarised
