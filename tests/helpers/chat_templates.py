"""Chat templates of the shapes that small models ship, in short: each has the constructs of its family.

Each is a file of `templates/`, whose last line break is not part of it.
"""

from __future__ import annotations

from pathlib import Path


def _template(name: str) -> str:
    return (Path(__file__).with_name("templates") / f"{name}.jinja").read_text(encoding="utf-8")[:-1]


OF_FAMILIES = {
    "SmolLM2": _template("smollm2"),
    "SmolLM3": _template("smollm3"),
    "Qwen2.5": _template("qwen2.5"),
    "Qwen3": _template("qwen3"),
    "Llama 3.2": _template("llama-3.2"),
    "Granite 3": _template("granite-3"),
    "Gemma 2": _template("gemma-2"),
    "Gemma 3": _template("gemma-3"),
    "Mistral": _template("mistral"),
    "Llama 2": _template("llama-2"),
    "Phi-3": _template("phi-3"),
    "Phi-4-mini": _template("phi-4-mini"),
    "DeepSeek-R1-Distill": _template("deepseek-r1-distill"),
    "LFM2": _template("lfm2"),
    "OLMo 2": _template("olmo-2"),
    "EXAONE 4": _template("exaone-4"),
    "oddities": _template("oddities"),
}
GEMMA2, SMOLLM2 = OF_FAMILIES["Gemma 2"], OF_FAMILIES["SmolLM2"]
