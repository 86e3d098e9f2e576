"""merino-edge: design, train, export and run small language models for NVIDIA Jetson boards.

The names in `__all__` are the public Python API. Each lives in a room of its own and is loaded when it is first used.
So `import merino_edge` takes a few milliseconds and needs neither NumPy nor PyTorch:

    from merino_edge import Chat, Sampling, open_engine

    engine, tokenizer, bundle = open_engine("lamb")
    chat = Chat(engine, tokenizer, Sampling(seed=1))
    print("".join(chat.send("Tell me a story about a dog.")))
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# From 1.29 on ONNX Runtime makes an identifier in the home folder, and sends events. This keeps it from both. It is
# read when `onnxruntime` is imported, which every module of ours does later. A value of the user's own stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors
    from merino_edge.architecture import Architecture, Block
    from merino_edge.checkpoint import load as load_checkpoint
    from merino_edge.convert.import_model import import_model
    from merino_edge.export.bundle_writer import write_bundle
    from merino_edge.export.prepare_weights import ExportOptions
    from merino_edge.latency.table_file import load_table
    from merino_edge.presets import preset
    from merino_edge.runtime.chat import Chat
    from merino_edge.runtime.generation import generate
    from merino_edge.runtime.open_bundle import open_engine
    from merino_edge.runtime.sampling_parameters import Sampling
    from merino_edge.runtime.session import Session
    from merino_edge.search.budget import Budget
    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.result import SearchConfig, run_search
    from merino_edge.search.score import parse_score

__version__ = "0.1.0"
__all__ = [
    "Architecture",
    "Block",
    "Budget",
    "Chat",
    "ExportOptions",
    "Sampling",
    "SearchConfig",
    "Session",
    "generate",
    "import_model",
    "load_checkpoint",
    "load_space",
    "load_table",
    "open_engine",
    "parse_score",
    "preset",
    "run_search",
    "write_bundle",
]

# The module of each name, and what it is called there if not the same. As text: an import here would load the room.
_HOMES = {
    "Architecture": "merino_edge.architecture",
    "Block": "merino_edge.architecture",
    "Budget": "merino_edge.search.budget",
    "Chat": "merino_edge.runtime.chat",
    "ExportOptions": "merino_edge.export.prepare_weights",
    "Sampling": "merino_edge.runtime.sampling_parameters",
    "SearchConfig": "merino_edge.search.result",
    "Session": "merino_edge.runtime.session",
    "generate": "merino_edge.runtime.generation",
    "import_model": "merino_edge.convert.import_model",
    "load_checkpoint": "merino_edge.checkpoint:load",
    "load_space": "merino_edge.search.builtin_spaces",
    "load_table": "merino_edge.latency.table_file",
    "open_engine": "merino_edge.runtime.open_bundle",
    "parse_score": "merino_edge.search.score",
    "preset": "merino_edge.presets",
    "run_search": "merino_edge.search.result",
    "write_bundle": "merino_edge.export.bundle_writer",
}

if not TYPE_CHECKING:  # hidden from type checkers, which would believe that every name exists

    def __getattr__(name: str) -> Any:
        """Load a public name when it is first used (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, original = _HOMES[name].partition(":")
        value = getattr(import_module(module), original or name)
        globals()[name] = value  # the next use finds it without a call
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
