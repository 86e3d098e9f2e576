"""A session of ONNX Runtime: a graph that is loaded for a device, with our settings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.runtime.engines.node_placement import CUDA_PROVIDER, has_cuda

OLDEST_ONNX_RUNTIME = (1, 23)  # the first with CPU kernels for the operators of opset 23
FIRST_WITH_TENSOR_SCATTER = (1, 25)  # which only the `native` lowering needs
FIRST_WITH_INT8_CACHE = (1, 27)
# Environment variables of ONNX Runtime. WHOLE_ROWS: attention by whole rows of scores instead of pieces, read when a
# session is created. ROUNDED_QUERIES: queries rounded to 8 bits for an int8 KV cache with one scale, read at the first
# step.
WHOLE_ROWS, ROUNDED_QUERIES = "ORT_GQA_DISABLE_FLASH_ATTENTION", "ORT_MLAS_QKGEMM_S8_APPROX_VNNI"


def installed_version() -> tuple[int, ...]:
    """The version of ONNX Runtime as (major, minor)."""
    import onnxruntime as ort

    return tuple(map(int, ort.__version__.split(".")[:2]))


def open_session(
    graph: Path | bytes, threads: int, fewest_heads: int, *, device: str, spinning: bool, weights: Path | None = None
) -> Any:
    """Load `graph`, the path of a graph or a serialized model, on `device`: cpu or cuda.

    `weights` is the folder of a serialized model's weights, where it does not hold them.

    `fewest_heads`: of the model's blocks. With `spinning` idle threads wait actively for some milliseconds. Raises
    ArtefactError (a graph that cannot be loaded) and UnsupportedError (ONNX Runtime is too old, or has no CUDA).
    """
    import onnxruntime as ort

    installed = installed_version()
    if installed < OLDEST_ONNX_RUNTIME:
        needed = ".".join(map(str, OLDEST_ONNX_RUNTIME))
        raise UnsupportedError(
            f"bundles need ONNX Runtime {needed}, {ort.__version__} is installed",
            "run: pip install -U onnxruntime",
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # would reserve the activations of all shapes at once, and saves no time
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    # No spinning between steps: the threads of another engine, such as a draft model, need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # errors are raised as exceptions, which the user sees as one line
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    providers = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, CUDA_PROVIDER)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        ort.set_default_logger_severity(4)
        if not has_cuda():
            raise UnsupportedError(
                f"ONNX Runtime {ort.__version__} is built without CUDA",
                "replace the package onnxruntime by onnxruntime-gpu, or use the CPU",
            )
    source = graph if isinstance(graph, bytes) else str(graph)
    # Whole rows are up to twice as fast (docs/lab-notes.md), unless there are more threads than heads.
    os.environ.setdefault(ROUNDED_QUERIES, "1")
    try:
        with _environment(WHOLE_ROWS, str(int(threads <= fewest_heads))):
            return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # the library's own exception types share no base class
        where = "the graph" if isinstance(graph, bytes) else str(graph)
        if installed < FIRST_WITH_TENSOR_SCATTER and ("Opset 24" in str(error) or "TensorScatter" in str(error)):
            raise UnsupportedError(
                f"{where} needs ONNX Runtime {'.'.join(map(str, FIRST_WITH_TENSOR_SCATTER))} (Python 3.11),"
                f" {ort.__version__} is installed",
                "export it for this one: merino-edge export CKPT --lowering ort",
            ) from None
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"ONNX Runtime cannot load {where} ({reason})", "export the bundle again") from None


def run_bound(session: Any, binding: Any, *, wait: bool = False) -> None:
    """Run a step with bound inputs and outputs; `wait` for a GPU. Raises ArtefactError."""
    try:
        session.run_with_iobinding(binding)
        if wait:
            binding.synchronize_outputs()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(
            f"ONNX Runtime cannot run the graph ({reason})", "export it again, or with less --context"
        ) from None


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process meanwhile, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
