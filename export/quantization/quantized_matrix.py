"""A quantised matrix: codes, their scales and, where its blocks are not centred on zero, an offset for each block.

Knows no target, no graph and no search: how scales are found is up to `merino_edge.export.quantization.rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from merino_edge.counts import SCALE_BYTES


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, G * B] as codes int8 [N, G, B] times scales float32 [N, G].

    `offsets` holds one number per block [N, G], itself quantised: zeros fill it up to whole blocks. A block's offset is
    added to each of its weights. An offset times each input of its block is the offset times the sum of the inputs. So
    a matrix with offsets multiplies inputs and block sums like a symmetric one (`extended`), which every int4 kernel
    can do.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    offsets: QuantizedMatrix | None = None

    @property
    def inputs(self) -> int:
        """The number of inputs, G * B."""
        return int(self.codes[0].size)

    @property
    def extended_inputs(self) -> int:
        """The number of inputs, and of block sums where there are offsets."""
        return self.inputs + (0 if self.offsets is None else self.codes.shape[1])

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales in a bundle for ONNX Runtime.

        Scales are float16; with offsets they are bytes and one float16 per row.
        """
        if self.offsets is None:
            return int(self.codes.size * self.bits // 8 + SCALE_BYTES * self.scales.size)
        return int(len(self.codes) * (self.stored_row_bytes + self.extended().scales.shape[1] + SCALE_BYTES))

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one row's codes, without the zeros that fill up the last block of offsets."""
        return -(-self.extended_inputs * self.bits // 8)

    def dequantize(self) -> np.ndarray:
        """The matrix [N, G * B] as float32."""
        values = self.codes.astype(np.float32) * self.scales[..., None]
        if self.offsets is not None:
            values += self.offsets.dequantize()[:, : values.shape[1], None]
        return np.asarray(values.reshape(len(self.codes), -1))

    def extended(self) -> QuantizedMatrix:
        """The symmetric matrix [N, G * B + O * B] over inputs and block sums; this one where it has no offsets."""
        if self.offsets is None:
            return self
        codes = np.concatenate([self.codes, self.offsets.codes], axis=1)
        return QuantizedMatrix(codes, np.concatenate([self.scales, self.offsets.scales], axis=1), self.bits)

    def rows(self, indices: np.ndarray) -> QuantizedMatrix:
        """The matrix of these outputs alone."""
        offsets = self.offsets and self.offsets.rows(indices)
        return replace(self, codes=self.codes[indices], scales=self.scales[indices], offsets=offsets)

    def scaled(self, factor: float) -> QuantizedMatrix:
        """This matrix times a positive number."""
        offsets = self.offsets and self.offsets.scaled(factor)
        return replace(self, scales=self.scales * np.float32(factor), offsets=offsets)


def stacked(parts: list[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices with the same bits and inputs, one below the other along N. Missing offsets become zeros."""
    codes, scales = (np.concatenate([getattr(part, field) for part in parts]) for field in ("codes", "scales"))
    if all(part.offsets is None for part in parts):
        return QuantizedMatrix(codes, scales, parts[0].bits)
    blocks = next(part.offsets for part in parts if part.offsets is not None).codes.shape[1:]
    zeros = [
        QuantizedMatrix(np.zeros((len(part.codes), *blocks), np.int8), part.scales[:, : blocks[0]], part.bits)
        for part in parts
    ]
    offsets = stacked([part.offsets or zero for part, zero in zip(parts, zeros, strict=True)])
    return QuantizedMatrix(codes, scales, parts[0].bits, offsets)
