"""Node placement: which nodes of a session ONNX Runtime runs on the CPU, though its device is a GPU.

A node without a kernel for CUDA runs on the CPU, and its inputs and outputs are copied. The session must record the
placement (`session.record_ep_graph_assignment_info`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from merino_edge.errors import UnsupportedError

CUDA_PROVIDER = "CUDAExecutionProvider"
# What an `ort` graph does with positions and lengths. ONNX Runtime leaves such whole numbers on the CPU by a rule
# of its own, since attention reads the length there.
INDEX_NODES = Counter(Slice=1, Reshape=1, Cast=1, Add=2, Neg=1, Shape=2, Concat=1)


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime is built with CUDA."""
    import onnxruntime as ort

    return CUDA_PROVIDER in ort.get_available_providers()


def nodes_outside(provider: str, session: Any) -> Counter[str]:
    """How many nodes of each operator a session runs by other providers."""
    subgraphs = session.get_provider_graph_assignment_info()
    return Counter(node.op_type for s in subgraphs if s.ep_name != provider for node in s.get_nodes())


def cpu_nodes(session: Any) -> Counter[str]:
    """How many nodes of each operator run on the CPU, without INDEX_NODES.

    Raises UnsupportedError where ONNX Runtime is too old to tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise UnsupportedError(
            "this ONNX Runtime does not tell which nodes run on the CPU", "install onnxruntime-gpu 1.24 or newer"
        )
    return nodes_outside(CUDA_PROVIDER, session) - INDEX_NODES


def warning(session: Any) -> str:
    """A line about the nodes that run on the CPU; "" where there are none."""
    try:
        found = cpu_nodes(session)
    except UnsupportedError as unknown:
        return str(unknown)
    nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    return f"ONNX Runtime runs on the CPU, with copies both ways: {nodes}" if nodes else ""
