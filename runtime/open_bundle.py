"""Opens a bundle: its engine, or several sequences, and its tokenizer. The only module that knows all engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merino_edge import bundle, engine_store, limits
from merino_edge.bundle import Bundle
from merino_edge.errors import InputError
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.runtime.engine import Alone, Engine, SequenceGroup
from merino_edge.runtime.sequence_memory import sequences_that_fit
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
    _check_threads(threads)
    loaded, tokenizer = _loaded(path, on_bundle)
    return _engine(loaded, threads, cpu=cpu, cuda_graphs=cuda_graphs), tokenizer, loaded


def open_sequences(
    path: Path | str,
    count: int | None,
    threads: int | None = None,
    *,
    cpu: bool = False,
    on_bundle: Callable[[Bundle], None] = lambda loaded: None,
) -> tuple[SequenceGroup, Tokenizer, Bundle]:
    """Like `open_engine`, but with `count` sequences that share the weights. The first member is the engine.

    `count` None takes as many as the free memory allows, up to 4. A GPU's engine holds one. Raises InputError where
    more are asked of it, and what `open_engine` raises.
    """
    _check_threads(threads)
    loaded, tokenizer = _loaded(path, on_bundle)
    on_cpu = cpu or not (engine_store.engines_of(loaded) or _on_cuda(loaded))
    if not on_cpu and (count or 1) > 1:
        raise InputError("an engine on a GPU holds one sequence", "leave --parallel out, or give --cpu")
    count = (count or sequences_that_fit(loaded)) if on_cpu else 1
    if count == 1:
        return Alone(_engine(loaded, threads, cpu=cpu)), tokenizer, loaded
    from merino_edge.runtime.engines.onnx_sequences import OnnxSequences

    tuned, spinning = _tuned(loaded, threads)
    return OnnxSequences.from_bundle(loaded, tuned, count=count, spinning=spinning), tokenizer, loaded


def _check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads out of its limits."""
    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)


def _loaded(path: Path | str, on_bundle: Callable[[Bundle], None]) -> tuple[Bundle, Tokenizer]:
    loaded = bundle.load(path)
    tokenizer = Tokenizer.load(loaded.path)
    on_bundle(loaded)
    return loaded, tokenizer


def _engine(loaded: Bundle, threads: int | None, *, cpu: bool, cuda_graphs: bool = True) -> Engine:
    # A backend's library is imported only when a bundle needs it.
    if not cpu and engine_store.engines_of(loaded):
        from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

        return TensorRtEngine.from_bundle(loaded, cuda_graphs=cuda_graphs)
    from merino_edge.runtime.engines.onnx_engine import OnnxEngine

    if not cpu and _on_cuda(loaded):
        return OnnxEngine.from_bundle(loaded, threads, device="cuda")
    tuned, spinning = _tuned(loaded, threads)
    return OnnxEngine.from_bundle(loaded, tuned, spinning=spinning)


def _on_cuda(loaded: Bundle) -> bool:
    from merino_edge.runtime.engines.node_placement import has_cuda

    return loaded.target == ONNX_CUDA_TARGET and has_cuda()


def _tuned(loaded: Bundle, threads: int | None) -> tuple[int | None, bool]:
    """The number of threads, and whether idle ones wait actively: as asked, or as measured on this machine."""
    from merino_edge.runtime.thread_tuning import tuning_for_this_machine

    tuning = tuning_for_this_machine(loaded) if threads is None else None
    return (threads, True) if tuning is None else (tuning.threads, tuning.spinning)
