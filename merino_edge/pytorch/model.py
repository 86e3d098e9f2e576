"""The PyTorch model of any `Architecture`: for training, for evaluation, and as the reference of every export.

Parameter names and shapes are those of `merino_edge.weights`, so `state_dict()` is a checkpoint's content. A shared
block is one layer module applied `layers` times, and every application has its own part of the cache. The code is eager
and plain on purpose, because on a board the exported graph runs. This module knows no files, tokenizer or optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merino_edge.architecture import Architecture, Block
from merino_edge.checkpoint import check_weights
from merino_edge.errors import InputError
from merino_edge.rotary import frequencies

INIT_STD = 0.02  # of linear layers and embeddings


class KVCache:
    """A static KV cache: k and v [B, Hkv, C, D] for each computed layer, written in place by `Model.forward`."""

    def __init__(
        self,
        architecture: Architecture,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = architecture.max_positions if capacity is None else capacity
        shapes = [(batch, b.kv_heads, self.capacity, architecture.head_dim) for b in architecture.layer_blocks()]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    def append(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k, v [B, Hkv, T, D] at start..start+T, and return the cache up to there [B, Hkv, start+T, D]."""
        end = start + k.shape[2]
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class _Context:
    """The state that all layers of one forward pass share: rotary angles, masks and cache."""

    def __init__(self, model: Model, length: int, cache: KVCache | None, start: int, device: torch.device) -> None:
        self.cache, self.start = cache, start
        self.positions = torch.arange(start, start + length, device=device)  # [T]
        # By window, [T, start+T]; None: plain causal, nothing before
        self.masks: dict[int, Tensor | None] = {
            window: self._mask(window) for window in {block.window for block in model.architecture.blocks}
        }
        self.angles: dict[str, tuple[Tensor, Tensor]] = {}  # cosines and sines [T, R] by the kind of rotary
        for kind, steps in model.frequencies.items():
            angles = self.positions[:, None].float() * steps.to(device)  # [T, R/2]
            self.angles[kind] = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def _mask(self, window: int) -> Tensor | None:
        rows, length = self.positions[:, None], self.start + len(self.positions)
        hides = 0 < window < length
        if self.start == 0 and not hides:
            return None
        columns = torch.arange(length, device=rows.device)
        return (columns <= rows) & (columns > rows - window) if hides else columns <= rows

    def rotate(self, x: Tensor, kind: str, rotary_dim: int) -> Tensor:
        """Rotary embedding of x [B, H, T, D]. The first half of the rotated part pairs with its second half."""
        if rotary_dim < x.shape[-1]:  # without this test the split costs a percent of a training step
            turned = self.rotate(x[..., :rotary_dim], kind, rotary_dim)
            return torch.cat((turned, x[..., rotary_dim:]), dim=-1)
        (cos, sin), (low, high) = self.angles[kind], x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, a: Architecture, block: Block) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim, self.grouped = a.head_dim, a.rotary_dim, block.kv_heads != block.heads
        self.qk_norm, self.window, self.rotary, self.cap = a.qk_norm, block.window, block.rotary, a.attention_cap
        width, bias = block.width, a.bias != "none"
        query_width, kv_width = block.heads * a.head_dim, block.kv_heads * a.head_dim
        self.query = nn.Linear(width, query_width, bias=bias)
        self.key = nn.Linear(width, kv_width, bias=bias)
        self.value = nn.Linear(width, kv_width, bias=bias)
        if a.qk_norm != "none":
            of_heads = a.qk_norm == "head"
            self.query_norm = nn.RMSNorm(a.head_dim if of_heads else query_width, eps=a.norm_epsilon)
            self.key_norm = nn.RMSNorm(a.head_dim if of_heads else kv_width, eps=a.norm_epsilon)
        self.output = nn.Linear(query_width, width, bias=a.bias == "all")

    def forward(self, x: Tensor, context: _Context, layer: int) -> Tensor:
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.query(x), self.key(x), self.value(x).view(split).transpose(1, 2)
        if self.qk_norm == "width":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.view(split), k.view(split)
        if self.qk_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # [B, H, T, D], [B, Hkv, T, D]
        if self.rotary_dim and self.rotary != "none":
            q, k = (context.rotate(part, self.rotary, self.rotary_dim) for part in (q, k))
        if context.cache is not None:
            k, v = context.cache.append(layer, k, v, context.start)
        mask = context.masks[self.window]
        if self.cap:
            mixed = self._capped(q, k, v, mask)
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
            )
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention whose scores are capped: PyTorch's own has no cap. Shapes as in `forward`."""
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)  # [B, H, T, S]
        scores = self.cap * (scores / self.cap).tanh()
        if mask is None:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


class _Ffn(nn.Module):
    def __init__(self, a: Architecture, block: Block) -> None:
        super().__init__()
        self.kind, bias = a.ffn, a.bias == "all"
        if a.gated:
            self.gate = nn.Linear(block.width, block.ffn_width, bias=bias)
        self.up = nn.Linear(block.width, block.ffn_width, bias=bias)
        self.down = nn.Linear(block.ffn_width, block.width, bias=bias)

        self.gated = a.gated

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._activate(self.gate(x)) * self.up(x) if self.gated else self._activate(self.up(x))
        return self.down(hidden)  # type: ignore[no-any-return]

    def _activate(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return F.silu(x)
        if self.kind in ("relu", "relu_squared"):
            return F.relu(x) if self.kind == "relu" else F.relu(x).square()
        return F.gelu(x, approximate="tanh" if self.kind.endswith("tanh") else "none")


class _Layer(nn.Module):
    def __init__(self, a: Architecture, block: Block) -> None:
        super().__init__()
        self.placement, self.parallel = a.norm_placement, a.parallel_residual
        self.attention_norm = _norm(a, block.width)
        self.attention = _Attention(a, block)
        self.ffn_norm = _norm(a, block.width)
        self.ffn = _Ffn(a, block)
        if a.norm_placement == "both":
            self.attention_output_norm, self.ffn_output_norm = _norm(a, block.width), _norm(a, block.width)

    def forward(self, x: Tensor, context: _Context, layer: int) -> Tensor:  # x: [B, T, W]
        if self.placement == "post":
            x = self.attention_norm(x + self.attention(x, context, layer))
            return self.ffn_norm(x + self.ffn(x))  # type: ignore[no-any-return]
        if self.placement == "after":
            x = x + self.attention_norm(self.attention(x, context, layer))
            return x + self.ffn_norm(self.ffn(x))  # type: ignore[no-any-return]
        if self.placement == "both":
            x = x + self.attention_output_norm(self.attention(self.attention_norm(x), context, layer))
            return x + self.ffn_output_norm(self.ffn(self.ffn_norm(x)))  # type: ignore[no-any-return]
        attended = x + self.attention(self.attention_norm(x), context, layer)
        return attended + self.ffn(self.ffn_norm(x if self.parallel else attended))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, a: Architecture, block: Block, width_before: int) -> None:
        super().__init__()
        self.depth = block.layers
        self.projection = _projection(width_before, block.width)
        self.layers = nn.ModuleList(_Layer(a, block) for _ in range(block.weight_layers))

    def forward(self, x: Tensor, context: _Context, first: int) -> Tensor:
        x = self.projection(x).to(x.dtype)  # under autocast the residual stream stays fp32
        for index in range(self.depth):
            x = self.layers[index % len(self.layers)](x, context, first + index)
        return x


class Model(nn.Module):
    """A decoder-only transformer of the given architecture, initialised from `seed`.

    Linear and embedding weights are N(0, 0.02). The last projections of the residual branches are smaller by
    1/sqrt(2 * layers). Biases are 0 and norms 1. Width projections are isometric (orthonormal rows or columns), because
    N(0, 0.02) would scale the stream down at every one of them (paper section 9). On the meta device the model has
    shapes only.
    """

    def __init__(self, architecture: Architecture, seed: int = 0) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.frequencies = {kind: torch.tensor(frequencies(a, kind).tolist(), device="cpu") for kind in a.rotaries}
        first, last = a.blocks[0].width, a.blocks[-1].width
        before = [first, *(block.width for block in a.blocks)]
        self.embedding = nn.Embedding(a.vocab_size, a.embedding_width)
        if a.positions == "learned":
            self.positions = nn.Embedding(a.position_rows, first)
        self.projection_in = _projection(a.embedding_width, first)
        self.blocks = nn.ModuleList(_Block(a, block, width) for block, width in zip(a.blocks, before, strict=False))
        self.final_norm = _norm(a, last) if a.final_norm else nn.Identity()
        self.projection_out = _projection(last, a.embedding_width)
        if not a.tied_head:
            self.head = nn.Linear(a.embedding_width, a.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self._initialise(seed)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, start: int = 0, *, last_only: bool = False
    ) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] int64 at positions start..start+T. With `last_only` they are [B, 1, V].

        With a cache, earlier positions are read from it and the new ones are added. A smaller `start` rewinds. Raises
        InputError for positions that the model or the cache does not have.
        """
        a, length = self.architecture, tokens.shape[1]
        capacity = a.max_positions if cache is None else min(cache.capacity, a.max_positions)
        if length == 0 or start < 0 or start + length > capacity or (start > 0 and cache is None):
            raise InputError(
                f"{length} tokens at position {start} do not fit {capacity} positions", "shorten the input"
            )
        context = _Context(self, length, cache, start, tokens.device)
        x = self.embedding(tokens)
        x = self.projection_in(x).to(x.dtype)  # [B, T, W_0]
        if a.positions == "learned":
            x = x + self.positions(context.positions + a.position_offset)
        first = 0
        for block, module in zip(a.blocks, self.blocks, strict=True):
            x = module(x, context, first)
            first += block.layers
        x = self.projection_out(self.final_norm(x[:, -1:] if last_only else x))  # [B, T, E]
        logits = F.linear(x, self.embedding.weight if a.tied_head else self.head.weight)
        return a.logit_cap * (logits / a.logit_cap).tanh() if a.logit_cap else logits

    @staticmethod
    def from_weights(architecture: Architecture, weights: Mapping[str, np.ndarray], *, copy: bool = True) -> Model:
        """A float32 model with a checkpoint's weights. Raises ArtefactError where they do not fit.

        Without `copy` float32 weights keep their memory: for a model that is only run.
        """
        check_weights(architecture, dict(weights), "weights")
        with torch.device("meta"):
            model = Model(architecture)
        as_tensor = torch.tensor if copy else torch.as_tensor
        state = {name: as_tensor(value, dtype=torch.float32) for name, value in weights.items()}
        model.load_state_dict(state, assign=True)
        return model

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear layer by the name of its matrix."""
        return {f"{name}.weight": module for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def to_weights(self) -> dict[str, np.ndarray]:
        """The weights as float32 arrays, by the names of `merino_edge.weights`."""
        return {name: value.float().numpy(force=True).copy() for name, value in self.state_dict().items()}

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.architecture.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                elif "projection" in name:
                    nn.init.orthogonal_(parameter, generator=generator)
                else:
                    residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
                    parameter.normal_(0.0, residual_std if residual else INIT_STD, generator=generator)


def _norm(a: Architecture, width: int) -> nn.Module:
    return (nn.LayerNorm if a.norm == "layernorm" else nn.RMSNorm)(width, eps=a.norm_epsilon)


def _projection(before: int, after: int) -> nn.Module:
    return nn.Identity() if before == after else nn.Linear(before, after, bias=False)
