"""What fits a model: the first lowering whose kernels compute it, and which matrices blocks do not divide.

The rules themselves are those by which bytes are counted (`merino_edge.storage`). A lowering that somebody asked for is
never replaced: `require_fit` refuses it.
"""

from __future__ import annotations

from dataclasses import replace

from merino_edge import cache_rings
from merino_edge.architecture import Architecture
from merino_edge.errors import UnsupportedError
from merino_edge.export.quantization.stored_weights import odd_matrices
from merino_edge.export.targets import Target
from merino_edge.storage import INT4_BLOCK, why_unfit


def fitted(target: Target, a: Architecture, context: int) -> Target:
    """`target`, or the same by its next lowering where its own cannot compute `a`, or another keeps far less cache.

    `context`: positions of the cache. Raises UnsupportedError where no lowering of the platform can, or where the cache
    goes with the first one only.
    """
    worth = cache_rings.are_worth(a, context)
    lowering = target.platform.rules.lowering_for(target.precision, a.head_dim, a.rotary_dim, rings_worth=worth)
    if lowering is None or (target.int8_cache and lowering != target.lowering):
        require_fit(target, a)
    return target if lowering is None else replace(target, lowering=lowering)


def require_fit(target: Target, a: Architecture) -> None:
    """Raise UnsupportedError where the target's lowering has no kernels for `a`."""
    if not (reason := why_unfit(target.lowering, a.head_dim, a.rotary_dim)):
        return
    others = [
        low for low in target.platform.lowerings_at(target.precision) if not why_unfit(low, a.head_dim, a.rotary_dim)
    ]
    hint = "leave --cache out" if target.int8_cache else f"choose --lowering {' or '.join(others)}"
    raise UnsupportedError(reason, hint if others else "choose --target onnxruntime")


def notes(target: Target, a: Architecture, usual: Target, context: int) -> list[str]:
    """What the user shall know, a line each.

    That is another lowering than the `usual` one, a cache that rings would shrink, and matrices of another precision.
    """
    lines = []
    whole, kept = (a.kv_bytes(context, target.storage.cache_bytes, rings=rings) / 1e6 for rings in (False, True))
    if target.lowering != usual.lowering:
        reason = why_unfit(usual.lowering, a.head_dim, a.rotary_dim)
        reason = reason or f"layers with a window keep only that, {kept:,.0f} MB of cache, not {whole:,.0f}"
        lines.append(f"the {target.lowering} lowering is taken, not {usual.lowering}: {reason}")
    elif target.on_tensorrt and target.lowering == "native" and kept < whole:
        lines.append(
            f"layers with a window keep the whole context: {whole:,.0f} MB of cache; "
            f"with --lowering primitive {kept:,.0f} MB"
        )
    odd = odd_matrices(a, target)
    for precision in sorted(set(odd.values())):
        first, *others = (name for name, own in odd.items() if own == precision)
        more = f" and {len(others)} more" if others else ""
        are = "are" if others else "is"
        lines.append(f"{first}{more} {are} stored at {precision}: {INT4_BLOCK} does not divide the number of inputs")
    return lines
