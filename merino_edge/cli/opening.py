"""How `generate` and `bench` open a bundle, and what they say of the engine in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.engine import Engine
    from merino_edge.tokenizer import Tokenizer


def open_bundle(
    path: Path, threads: int | None, cpu: bool, cuda_graphs: bool = True
) -> tuple[Engine, Tokenizer, Bundle]:
    """See merino_edge.runtime.engine.open_engine. Where every engine was built on another board, under another release
    or power mode, the last is named on stderr before it is opened; so is a graph for TensorRT that is not compiled yet.
    """
    from merino_edge.runtime.engine import open_engine

    return open_engine(path, threads, cpu, cuda_graphs, lambda loaded: None if cpu else _tell(loaded))


def _tell(loaded: Bundle) -> None:
    from merino_edge.cli.console import stderr

    again = f"merino-edge build {loaded.path}"
    note = ""
    if loaded.engines:
        from merino_edge.jetson.device import device_card
        from merino_edge.jetson.traps import engine_traps

        here = device_card()
        found = [engine_traps(entry.get("machine", {}), here) for entry in loaded.engines]
        note = f"warning: {found[-1][0]['found']}; build it again: {again}" if all(found) else ""
    elif loaded.target != "onnxruntime":
        note = f"no engine in {loaded.path} yet: running on the CPU; on the board: {again}"
    if note:
        stderr().print(note, highlight=False, soft_wrap=True, markup=False)
