"""Opens a bundle: returns its engine and its tokenizer. The only module that knows all engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merino_edge import bundle, engine_store, limits
from merino_edge.bundle import Bundle
from merino_edge.graph_io import ONNX_CUDA_TARGET
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
    """Verify a bundle and load it on its TensorRT engine for this GPU, or else on the CPU.

    A bundle for ONNX Runtime on CUDA is loaded on the GPU where that is installed.
    `cpu` always takes the CPU. `threads` None takes the number that was measured to be best on this machine, or all
    cores where nothing was measured. With `cuda_graphs` TensorRT launches a step as one CUDA graph. `on_bundle` is
    called with the verified bundle before a backend opens it.

    Raises ArtefactError (missing or altered files), InputError (threads), and UnsupportedError or MissingExtraError
    (this machine has no such TensorRT or GPU).
    """
    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    loaded = bundle.load(path)
    tokenizer = Tokenizer.load(loaded.path)
    on_bundle(loaded)
    # A backend's library is imported only when a bundle needs it.
    if not cpu and engine_store.engines_of(loaded):
        from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

        return TensorRtEngine.from_bundle(loaded, cuda_graphs=cuda_graphs), tokenizer, loaded
    from merino_edge.runtime.engines.node_placement import has_cuda
    from merino_edge.runtime.engines.onnx_engine import OnnxEngine
    from merino_edge.runtime.thread_tuning import tuning_for_this_machine

    if loaded.target == ONNX_CUDA_TARGET and not cpu and has_cuda():
        return OnnxEngine.from_bundle(loaded, threads, device="cuda"), tokenizer, loaded
    if threads is None and (tuning := tuning_for_this_machine(loaded)):
        return OnnxEngine.from_bundle(loaded, tuning.threads, spinning=tuning.spinning), tokenizer, loaded
    return OnnxEngine.from_bundle(loaded, threads), tokenizer, loaded
