"""Models that people put on a board, by their names on the hub, with the shapes from their own config.json.

From a shape follow the parameters and the memory while a model runs. `import --list` prints them. Any other model of a
supported family can be imported too.
"""

from __future__ import annotations

from dataclasses import dataclass

from merino_edge import names

SCALE_BITS = 4.5  # of a weight at int4, with its share of a scale
SHORTEST = 3  # characters of a part of a name
SYSTEM_BYTES = 1_500_000_000  # of a board without a desktop, with CUDA and its libraries


@dataclass(frozen=True)
class KnownModel:
    """A model of the hub. Widths are in numbers, not bytes."""

    name: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    tied_head: bool = True
    gated: bool = False  # the hub wants its terms accepted
    convolutions: int = 0  # layers with a short convolution in place of attention

    @property
    def parameters(self) -> int:
        """The parameters, without biases: within 0.1 % of all."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mixers = (self.layers - self.convolutions) * attention + self.convolutions * 4 * self.width**2
        layer = 3 * self.width * self.ffn_width + 2 * self.width
        return self.vocab_size * self.width * (1 if self.tied_head else 2) + mixers + self.layers * layer + self.width

    @property
    def download_bytes(self) -> int:
        """The bytes to download: two for each parameter."""
        return 2 * self.parameters

    def running_bytes(self, positions: int) -> int:
        """Bytes while it runs at int4, with an int8 embedding and head, and a float16 cache of so many positions."""
        ends = self.vocab_size * self.width * (1 if self.tied_head else 2)
        weights = ends + (self.parameters - ends) * SCALE_BITS / 8
        cache = 2 * (self.layers - self.convolutions) * self.kv_heads * self.head_dim * 2 * positions
        return round(weights) + cache

    def fits(self, memory_bytes: int, positions: int) -> bool:
        """Whether a board of so much memory runs it beside its system."""
        return self.running_bytes(positions) + SYSTEM_BYTES <= memory_bytes


KNOWN = (
    KnownModel("HuggingFaceTB/SmolLM2-135M-Instruct", 49152, 576, 30, 9, 3, 64, 1536),
    KnownModel("HuggingFaceTB/SmolLM2-360M-Instruct", 49152, 960, 32, 15, 5, 64, 2560),
    KnownModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", 49152, 2048, 24, 32, 32, 64, 8192),
    KnownModel("HuggingFaceTB/SmolLM3-3B", 128256, 2048, 36, 16, 4, 128, 11008),
    KnownModel("Qwen/Qwen2.5-0.5B-Instruct", 151936, 896, 24, 14, 2, 64, 4864),
    KnownModel("Qwen/Qwen2.5-1.5B-Instruct", 151936, 1536, 28, 12, 2, 128, 8960),
    KnownModel("Qwen/Qwen3-0.6B", 151936, 1024, 28, 16, 8, 128, 3072),
    KnownModel("Qwen/Qwen3-1.7B", 151936, 2048, 28, 16, 8, 128, 6144),
    KnownModel("Qwen/Qwen3-4B", 151936, 2560, 36, 32, 8, 128, 9728),
    KnownModel("meta-llama/Llama-3.2-1B-Instruct", 128256, 2048, 16, 32, 8, 64, 8192, gated=True),
    KnownModel("meta-llama/Llama-3.2-3B-Instruct", 128256, 3072, 28, 24, 8, 128, 8192, gated=True),
    KnownModel("google/gemma-3-270m-it", 262144, 640, 18, 4, 1, 256, 2048, gated=True),
    KnownModel("google/gemma-3-1b-it", 262144, 1152, 26, 4, 1, 256, 6912, gated=True),
    KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 32000, 2048, 22, 32, 4, 64, 5632, tied_head=False),
    KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 151936, 1536, 28, 12, 2, 128, 8960, tied_head=False),
    KnownModel("LiquidAI/LFM2-350M", 65536, 1024, 16, 16, 8, 64, 4608, convolutions=10),
    KnownModel("LiquidAI/LFM2-700M", 65536, 1536, 16, 24, 8, 64, 6912, convolutions=10),
    KnownModel("LiquidAI/LFM2-1.2B", 65536, 2048, 16, 32, 8, 64, 8192, convolutions=10),
    KnownModel("microsoft/Phi-4-mini-instruct", 200064, 3072, 32, 24, 8, 128, 8192),
    KnownModel("tiiuae/Falcon3-1B-Instruct", 131072, 2048, 18, 8, 4, 256, 8192, tied_head=False),
    KnownModel("allenai/OLMo-2-0425-1B-Instruct", 100352, 2048, 16, 16, 16, 128, 8192, tied_head=False),
)


def near(text: str) -> str | None:
    """The name of the first known model that `text` is a part of, or nearly; None where none is: `qwen3` is enough."""
    bare = {model.name.partition("/")[2].lower(): model.name for model in KNOWN}
    parts = (name for short, name in bare.items() if len(text) >= SHORTEST and text.lower() in short)
    alike = names.near(text, bare, names.LIKE_A_FILE)
    return next(parts, bare[alike] if alike else None)
