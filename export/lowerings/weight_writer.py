"""Writes stored weights into a graph, as initializers and as the products that read them.

| precision | onnxruntime | TensorRT |
|---|---|---|
| fp32 | float32 | float32 |
| fp16 | float16, cast to float32 when the graph is loaded | float16 |
| int8 | int8, one scale per block of inputs | int8, one scale per output |
| int4 | int4, one scale and perhaps one offset per block of inputs | the same |
| embedding and head at int8 and int4 | int8, one scale per token, one table if tied | int8 head, float16 embedding |

Scales are float16. For ONNX Runtime, matrices with offsets store theirs as bytes times a float16 per row, which pays
for the room of the offsets. An offset is one more input of the matrix, the sum of its block's inputs
(merino_edge.export.quantization.quantized_matrix).
ONNX Runtime reads codes by the kernels MatMulNBits and GatherBlockQuantized, with scales cast to float32 at loading.
The `native` lowering keeps to ONNX's own operators where it can: a blocked DequantizeLinear and a MatMul, which ONNX
Runtime fuses into MatMulNBits. `WeightWriter.matmul` tells where it would not fuse them.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge.export.lowerings.table_pieces import look_up, row_ranges
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix, stacked
from merino_edge.export.quantization.rounding import scales_to_bytes
from merino_edge.export.quantization.stored_weights import EMBEDDING, HEAD, StoredWeights
from merino_edge.export.targets import Target

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
ALIAS = ".twin"  # suffix of an initializer's name: an alias, whose bytes are those of the name without the suffix
LARGEST_BLOCK = 256  # most inputs that share a scale in MatMulNBits
BYTE = np.array(1 / 255, np.float32)

KernelForm = tuple[ir.Value, ir.Value, int]  # codes and scales as ONNX Runtime's kernels read them, and the block


class WeightWriter:
    """Adds weights and their products to a tape; every weight is added once, however often it is used.

    `dtype` is the type that matrices compute in; a builder may change it between products.
    """

    def __init__(self, tape: Tape, target: Target, stored: StoredWeights) -> None:
        self.tape, self.target, self.stored = tape, target, stored
        self.dtype = target.compute_dtype
        self.values: dict[str, ir.Value] = {}
        self.kernel_forms: dict[str, KernelForm] = {}

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer `name`, which is added with the values of `array` if it is not there yet."""
        if name not in self.values:
            self.values[name] = self.tape.initializer(ir.Tensor(np.ascontiguousarray(array), name=name))
        return self.values[name]

    def matmul(
        self,
        x: ir.Value,
        names: Sequence[str],
        factors: Sequence[float] = (),
        bias: ir.Value | None = None,
        *,
        unfused: bool = False,
    ) -> ir.Value:
        """x [.., K] times the weights `names` [N_i, K], stacked along N, plus a bias [sum N_i]: [.., sum N_i].

        Each weight is multiplied by its factor. `unfused`: ONNX Runtime would not fuse DequantizeLinear and MatMul
        here, because the codes have several consumers or a Relu follows at once. Then MatMulNBits is written, as it is
        for matrices with offsets. Without it a further layer of a shared int8 block took 1.40 ms instead of 0.15. An
        int4 ReLU layer without biases took 0.79 ms instead of 0.09 (docs/lab-notes.md).
        """
        name = "+".join(names) + ".weight"
        factors = factors or [1.0] * len(names)
        if f"{names[0]}.weight" in self.stored.quantized:
            parts = [self.stored.quantized[f"{n}.weight"].scaled(f) for n, f in zip(names, factors, strict=True)]
            return self._quantized_product(x, name, stacked(parts), bias, unfused=unfused)
        if name not in self.values:
            arrays = [self.stored.arrays[f"{n}.weight"] * np.float32(f) for n, f in zip(names, factors, strict=True)]
            weight = np.concatenate(arrays).astype(self.stored.arrays[f"{names[0]}.weight"].dtype)
            self.values[name] = self._computed(self.initializer(f"stored.{name}", weight.T))
        return self._product(x, self.values[name], bias)

    def _product(self, x: ir.Value, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
        product = self.tape.op("MatMul", [x, matrix])
        return product if bias is None else self.tape.op("Add", [product, bias])

    def _quantized_product(
        self, x: ir.Value, name: str, q: QuantizedMatrix, bias: ir.Value | None, *, unfused: bool
    ) -> ir.Value:
        if q.offsets is not None:
            x = self._with_block_sums(x, q)
        by_kernel = unfused or self.target.lowering != "native" or q.codes.shape[1] == 1 or q.offsets is not None
        if by_kernel and not self.target.on_tensorrt:
            return self._matmul_nbits(x, name, q, bias)
        if name not in self.values:
            self.values[name] = self._dequantized(name, q.extended())
        return self._product(x, self.values[name], bias)

    def _with_block_sums(self, x: ir.Value, q: QuantizedMatrix) -> ir.Value:
        """x [1, T, K] followed by the sums of its G blocks: [1, T, K + G]; for TensorRT filled up to whole blocks."""
        _, groups, block = q.codes.shape
        blocks = self.tape.op("Reshape", [x, self.shape(1, -1, groups, block)])
        sums = self.tape.op("ReduceSum", [blocks, self.shape(-1)], {"keepdims": 0})  # [1, T, G]
        extended = self.tape.op("Concat", [x, sums], {"axis": -1})
        if not self.target.on_tensorrt or groups % block == 0:
            return extended
        return self.tape.op("Pad", [extended, self.shape(0, 0, 0, 0, 0, -groups % block)])

    def shape(self, *sizes: int) -> ir.Value:
        """The constant `sizes` int64 [len(sizes)]: a shape, axes or other whole numbers."""
        return self.initializer(f"shape.{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def _matmul_nbits(self, x: ir.Value, name: str, q: QuantizedMatrix, bias: ir.Value | None) -> ir.Value:
        """A product by com.microsoft.MatMulNBits."""
        codes, scales, block = self._kernel_form(name, q)
        inputs: list[ir.Value | None] = [x, codes, scales]
        inputs += [None, None, bias] if bias is not None else []
        shape = {"K": q.extended_inputs, "N": len(q.codes), "bits": q.bits, "block_size": block, "accuracy_level": 4}
        return self.tape.op("MatMulNBits", inputs, shape, domain=MICROSOFT)

    def _kernel_form(self, name: str, q: QuantizedMatrix) -> KernelForm:
        """Codes uint8 [N, G, B * bits / 8] with the middle as zero, scales [N, G], and the block B.

        Where a whole row has one scale, B is the largest power of two that divides the row and that the kernel takes.
        """
        if name in self.kernel_forms:
            return self.kernel_forms[name]
        extended = q.extended()
        outputs, groups, block = extended.codes.shape
        if groups == 1:
            block = min(block & -block, LARGEST_BLOCK)
        codes = (extended.codes.astype(np.int16) + (1 << (q.bits - 1))).astype(np.uint8).reshape(outputs, -1, block)
        if q.bits == 4:
            codes = np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4, dtype=np.uint8))
        if q.offsets is not None:
            scales = self._byte_scales(name, extended.scales)
            self.kernel_forms[name] = self._codes_without_filling(name, codes, q), scales, block
            return self.kernel_forms[name]
        scales = self._computed(self.initializer(f"{name}.scale", q.scales.astype(np.float16)))
        if groups == 1:
            shape = self.initializer(f"{name}.scales", np.array([outputs, codes.shape[1]], np.int64))
            scales = self.tape.op("Expand", [scales, shape])
        self.kernel_forms[name] = self.initializer(name, codes), scales, block
        return self.kernel_forms[name]

    def _codes_without_filling(self, name: str, codes: np.ndarray, q: QuantizedMatrix) -> ir.Value:
        """Codes [N, G, B / 2] that are stored without the zeros at the end of each row; loading the graph adds them."""
        rows = codes.reshape(len(codes), -1)
        used = q.stored_row_bytes
        if used == rows.shape[1]:
            return self.initializer(name, codes)
        missing = self.shape(0, 0, 0, rows.shape[1] - used)
        filled = self.tape.op("Pad", [self.initializer(name, rows[:, :used]), missing])
        return self.tape.op("Reshape", [filled, self.shape(*codes.shape)])

    def _byte_scales(self, name: str, scales: np.ndarray) -> ir.Value:
        """Scales [N, G], stored as bytes of each row's largest."""
        codes, most = scales_to_bytes(scales)
        most_value, codes_value = (
            self._cast(self.initializer(f"{name}.scale{suffix}", array), ir.DataType.FLOAT)
            for suffix, array in (("", most), (".codes", codes))
        )
        unit = self.tape.op("Mul", [most_value, self.initializer("byte", BYTE)])
        scales_value = self.tape.op("Mul", [codes_value, unit])
        return scales_value if self.dtype == ir.DataType.FLOAT else self._cast(scales_value, self.dtype)

    def head(self, x: ir.Value, *, tied: bool) -> ir.Value:
        """Logits [N, V] of x [N, E]; [N, V'] where the vocabulary is pruned.

        A tied table is stored once, and loading the graph takes the rows of the pruned vocabulary from it. A matrix
        that is not quantised stays [V, E]. One that is too large for the target is written in pieces.
        """
        name = HEAD if self.stored.own_head or not tied else EMBEDDING
        if len(pieces := self._pieces(name)) > 1:
            return self._head_in_pieces(x, name, pieces)
        if self.stored.own_head:
            return self.matmul(x, ["head"])
        pruned_vocab = self.stored.pruned_vocab if tied else None
        if name in self.stored.quantized:
            q = self.stored.quantized[name]
            if pruned_vocab is not None:
                codes, scales, block = self._kernel_form(name, q)
                self.kernel_forms[HEAD] = self._pruned_rows(codes), self._pruned_rows(scales), block
                name, q = HEAD, q.rows(pruned_vocab)
            return self._matmul_nbits(x, name, q, None)
        table = self.initializer(name, self.stored.arrays[name])
        table = self._computed(table if pruned_vocab is None else self._pruned_rows(table))
        return self.tape.op("Gemm", [x, table], {"transB": 1})

    def pruned_vocab(self) -> ir.Value:
        """Ids [V'] of the tokens that the head keeps."""
        assert self.stored.pruned_vocab is not None
        return self.initializer("kept", self.stored.pruned_vocab.astype(np.int64))

    def _pruned_rows(self, table: ir.Value) -> ir.Value:
        """The rows of `table` [V, ..] that belong to the pruned vocabulary."""
        rows = self.tape.op("Gather", [table, self.pruned_vocab()])
        if table.dtype is not None:
            rows.dtype = table.dtype
        return rows

    def gather_rows(self, name: str, rows: ir.Value, *, shared_with_head: bool = False) -> ir.Value:
        """Rows of the table `name` [V, E] as float32 [1, T, E]; `shared_with_head`: the head multiplies by it too."""
        aliased = shared_with_head and not self.target.on_tensorrt
        if name in self.stored.quantized:
            q = self.stored.quantized[name]
            codes, scales, block = self._kernel_form(name, q)
            codes = self._alias(codes) if aliased else codes
            shape = self.initializer(f"{name}.blocks", np.array([len(q.codes), -1, 1], np.int64))
            inputs = [codes, rows, self.tape.op("Reshape", [scales, shape])]
            attributes = {"bits": q.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 2}
            blocks = self.tape.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)  # [1, T, G, B]
            shape = self.initializer(f"{name}.row", np.array([1, -1, q.codes[0].size], np.int64))
            found = self.tape.op("Reshape", [blocks, shape])
            return found if self.dtype == ir.DataType.FLOAT else self._cast(found, ir.DataType.FLOAT)
        table = self.stored.arrays[name]
        if len(pieces := self._pieces(name)) > 1:
            tables = [self._piece(name, *piece) for piece in pieces]
            gathered = look_up(self.tape, self.shape, tables, pieces, rows)
        else:
            stored = self.initializer(name, table)
            gathered = self.tape.op("Gather", [self._alias(stored) if aliased else stored, rows])
        return gathered if table.dtype == np.float32 else self._cast(gathered, ir.DataType.FLOAT)

    def _pieces(self, name: str) -> list[tuple[int, int]]:
        """(first, end) of the rows of the table `name` that are written together, as few pieces as the target takes.

        A pruned vocabulary leaves the table whole, since its rows are chosen from that.
        """
        most = self.target.platform.largest_weight_bytes if self.stored.pruned_vocab is None else None
        quantized = self.stored.quantized.get(name)
        table = self.stored.arrays[name] if quantized is None else quantized.codes
        return row_ranges(len(table), table.nbytes, most)

    def _piece(self, name: str, first: int, end: int) -> ir.Value:
        return self.initializer(f"{name}.{first}", self.stored.arrays[name][first:end])

    def _head_in_pieces(self, x: ir.Value, name: str, pieces: Sequence[tuple[int, int]]) -> ir.Value:
        """Logits [N, V] of x [N, E] by the matrix `name`, whose pieces are multiplied one by one.

        Each float product waits for the one before by adding zero times a logit of it. Without that TensorRT for RTX
        joins the pieces again, and stores them once for each profile (docs/lab-notes.md).
        """
        products: list[ir.Value] = []
        zero = self.initializer(f"zero.{self.dtype.name}", np.zeros((1, 1), self.dtype.numpy()))
        for first, end in pieces:
            if name in self.stored.quantized:
                q = self.stored.quantized[name].rows(np.arange(first, end))
                products.append(self._quantized_product(x, f"{name}.{first}", q, None, unfused=False))
            else:
                table = self._computed(self._piece(name, first, end))
                if products:
                    before = self.tape.op(
                        "Slice", [products[-1], self.shape(0), self.shape(1), self.shape(1)]
                    )  # [N, 1]
                    x = self.tape.op("Add", [x, self.tape.op("Mul", [before, zero])])
                products.append(self.tape.op("Gemm", [x, table], {"transB": 1}))
        return self.tape.op("Concat", products, {"axis": -1})

    def _alias(self, table: ir.Value) -> ir.Value:
        """A second name for the bytes of `table`.

        ONNX Runtime frees a matrix once it is packed for multiplication, but only if nothing else reads it. With an
        alias it can; of the alias, only the rows that are looked up come into memory.
        """
        assert table.name is not None and table.const_value is not None
        return self.initializer(f"{table.name}{ALIAS}", table.const_value.numpy())

    def _dequantized(self, name: str, q: QuantizedMatrix) -> ir.Value:
        """The matrix [N, K] as the right-hand operand [K, N] of a MatMul.

        Scales have the type of the product. ONNX Runtime gets them by a cast, which it runs once when it loads the
        graph. TensorRT takes no cast there, and no scale of 0: a factor may have made one too small for float16.
        """
        codes = q.codes.reshape(len(q.codes), -1).T  # [K, N]
        code_type = ml_dtypes.int4 if q.bits == 4 else np.int8
        inputs = [self.initializer(f"stored.{name}", codes.astype(code_type))]
        blocked = q.bits == 4 or not self.target.on_tensorrt
        attributes = {"axis": 0, "block_size": q.codes.shape[2]} if blocked else {"axis": 1}
        stored_dtype = self.dtype if self.target.on_tensorrt else ir.DataType.FLOAT16
        scales = q.scales.T.astype(stored_dtype.numpy())  # [G, N]
        if self.target.on_tensorrt:
            scales = np.maximum(scales, np.finfo(scales.dtype).smallest_subnormal)
        scale = self.initializer(f"stored.{name}.scale", scales if blocked else scales[0])
        inputs.append(scale if stored_dtype == self.dtype else self._cast(scale, self.dtype))
        return self.tape.op("DequantizeLinear", inputs, attributes)

    def _computed(self, stored: ir.Value) -> ir.Value:
        """A stored float weight, cast to the type that matrices compute in."""
        if stored.dtype == self.dtype:
            return stored
        name = f"{stored.name} as {self.dtype.name}"
        if name not in self.values:
            self.values[name] = self._cast(stored, self.dtype)
        return self.values[name]

    def _cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.tape.op("Cast", [x], {"to": dtype.value})
