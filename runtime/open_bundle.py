"""Bundle -> engine, tokenizer: the only place that knows every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merino_edge import bundle, limits
from merino_edge.bundle import Bundle
from merino_edge.runtime.engine import Engine
from merino_edge.tokenizer import Tokenizer


def open_engine(
    path: Path | str,
    threads: int | None = None,
    *,
    cpu: bool = False,
    cuda_graphs: bool = True,
    on_bundle: Callable[[Bundle], None] = lambda loaded: None,
) -> tuple[Engine, Tokenizer, Bundle]:
    """Verify a bundle and load it: by the engine that TensorRT built last, where there is one, else its graph on the
    CPU, or always that with `cpu`. `threads` None: as many as were measured to be best here, if they were, else all
    cores. `cuda_graphs`: an engine of TensorRT launches a step as one graph. `on_bundle` is told what was verified
    before a backend opens it.

    Raises ArtefactError (missing, altered), InputError (threads), UnsupportedError, MissingExtraError (the engine's
    TensorRT or GPU is not here).
    """
    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    loaded = bundle.load(path)
    tokenizer = Tokenizer.load(loaded.path)
    on_bundle(loaded)
    # The backend's library loads only when a bundle opens.
    if loaded.engines and not cpu:
        from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

        return TensorRtEngine.from_bundle(loaded, cuda_graphs=cuda_graphs), tokenizer, loaded
    from merino_edge.runtime.engines.onnx_engine import OnnxEngine
    from merino_edge.runtime.thread_tuning import tuning_for_this_machine

    if threads is None and (tuning := tuning_for_this_machine(loaded)):
        return OnnxEngine.from_bundle(loaded, tuning.threads, spinning=tuning.spinning), tokenizer, loaded
    return OnnxEngine.from_bundle(loaded, threads), tokenizer, loaded
