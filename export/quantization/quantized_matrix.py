"""A quantised matrix: codes, their scales and, where blocks of weights are not centred on zero, offsets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from merino_edge.counts import SCALE_BYTES


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes int8 [N, G, B], scales float32 [N, G]: the weight [N, G * B] is codes * scales, and to every weight of a
    block its offset is added.

    `offsets` are the block offsets [N, G], filled up with zeros to whole blocks, as a matrix of the same form. Because
    an offset times each input of its block is the offset times their sum, the matrix multiplies like a symmetric one
    over inputs and block sums together (`extended`), which every int4 kernel can.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    offsets: QuantizedMatrix | None = None

    @property
    def inputs(self) -> int:
        return int(self.codes[0].size)

    @property
    def multiplied(self) -> int:
        """Inputs, and the block sums that offsets are multiplied by."""
        return self.inputs + (0 if self.offsets is None else self.codes.shape[1])

    @property
    def stored_bytes(self) -> int:
        """Codes and scales as ONNX Runtime's bundles hold them: bytes and a float16 per row with offsets."""
        if self.offsets is None:
            return int(self.codes.size * self.bits // 8 + SCALE_BYTES * self.scales.size)
        return int(len(self.codes) * (self.stored_row_bytes + self.extended().scales.shape[1] + SCALE_BYTES))

    @property
    def stored_row_bytes(self) -> int:
        """Of one row's codes, without those that fill up the last block of offsets."""
        return -(-self.multiplied * self.bits // 8)

    def dequantize(self) -> np.ndarray:
        """float32 [N, G * B]"""
        values = self.codes.astype(np.float32) * self.scales[..., None]
        if self.offsets is not None:
            values += self.offsets.dequantize()[:, : values.shape[1], None]
        return np.asarray(values.reshape(len(self.codes), -1))

    def extended(self) -> QuantizedMatrix:
        """The matrix [N, G * B + O * B] over inputs and block sums; this one where it has no offsets."""
        if self.offsets is None:
            return self
        codes = np.concatenate([self.codes, self.offsets.codes], axis=1)
        return QuantizedMatrix(codes, np.concatenate([self.scales, self.offsets.scales], axis=1), self.bits)

    def rows(self, which: np.ndarray) -> QuantizedMatrix:
        """The matrix of these outputs alone."""
        offsets = self.offsets and self.offsets.rows(which)
        return replace(self, codes=self.codes[which], scales=self.scales[which], offsets=offsets)

    def scaled(self, factor: float) -> QuantizedMatrix:
        """This matrix times a positive number."""
        offsets = self.offsets and self.offsets.scaled(factor)
        return replace(self, scales=self.scales * np.float32(factor), offsets=offsets)


def stacked(parts: list[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices of one bit width and as many inputs as one, along N. Offsets that some lack are zeros there."""
    codes, scales = (np.concatenate([getattr(part, what) for part in parts]) for what in ("codes", "scales"))
    if all(part.offsets is None for part in parts):
        return QuantizedMatrix(codes, scales, parts[0].bits)
    blocks = next(part.offsets for part in parts if part.offsets is not None).codes.shape[1:]
    zeros = [QuantizedMatrix(np.zeros((len(p.codes), *blocks), np.int8), p.scales[:, : blocks[0]], p.bits) for p in parts]
    offsets = stacked([part.offsets or zero for part, zero in zip(parts, zeros, strict=True)])
    return QuantizedMatrix(codes, scales, parts[0].bits, offsets)
