"""The layer that LFM2 has in place of attention: a gated short convolution, each channel by itself.

Source: LFM2 (Liquid AI, 2025), as `Lfm2ForCausalLM` of transformers computes it. What a layer must remember is the last
K - 1 of its gated inputs, for K taps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merino_edge.architecture import Architecture, Block

if TYPE_CHECKING:
    from merino_edge.pytorch.model import _Context


class Taps(nn.Module):
    """A causal convolution of each channel by itself, with weight [W, K]. The last tap is of the present position."""

    def __init__(self, width: int, taps: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, taps))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor, length: int) -> Tensor:
        """The last `length` positions [B, T, W] of x [B, up to K - 1 + T, W]; what is before x is zeros."""
        missing = self.weight.shape[1] - 1 + length - x.shape[1]
        padded = F.pad(x.transpose(1, 2), (missing, 0))  # [B, W, K - 1 + T]
        y = F.conv1d(padded, self.weight[:, None].to(x.dtype), self.bias, groups=x.shape[2])
        return y.transpose(1, 2)


class Convolution(nn.Module):
    """A gated short convolution (LFM2): C * taps(B * x), where one matrix makes B, C and x of the layer's input."""

    def __init__(self, a: Architecture, block: Block) -> None:
        super().__init__()
        width, bias = block.width, a.convolution_bias
        self.before = block.convolution - 1  # positions that a token sees before its own
        self.input = nn.Linear(width, 3 * width, bias=bias)
        self.taps = Taps(width, block.convolution, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, context: _Context, layer: int) -> Tensor:
        before, after, inner = self.input(x).chunk(3, dim=-1)  # the gates before and behind the taps, [B, T, W] each
        gated = before * inner
        if context.cache is not None:
            gated = context.cache.append_gated(layer, gated, context.start, self.before)
        return self.output(after * self.taps(gated, x.shape[1]))  # type: ignore[no-any-return]
