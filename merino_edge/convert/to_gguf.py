"""Export to GGUF: a checkpoint becomes one file that llama.cpp and what is built on it run, on every board's GPU.

The family is one of merino_edge.convert.gguf_families whose metadata, read back, gives the architecture: the origin's
if it can be. Matrices are stored at the precision: fp32, fp16, int8 (Q8_0) or int4 (Q4_1, embedding and head Q8_0).
Vectors stay float32. A matrix whose inputs are no multiple of 32 becomes float16. Layers that share weights get copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import __version__, artefact, atomic, checkpoint, names
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Weights
from merino_edge.convert import gguf_families, gguf_rope, gguf_vocabulary
from merino_edge.convert.imported import load_tokenizer
from merino_edge.convert.to_huggingface import flat, layout_modules, one_block, one_block_weights, tokenizer_settings
from merino_edge.errors import ArtefactError, MerinoError, UnsupportedError, require
from merino_edge.kind import GGUF
from merino_edge.weights import weight_shapes

if TYPE_CHECKING:
    import gguf
    import tokenizers

TYPES = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_1"}  # of matrices, by our precision
ENDS = ("embedding.weight", "head.weight")  # at int4 they are Q8_0: most of a small model's error is there
NAMES = {"mistral": "llama", "gemma3_text": "gemma3", "glm": "chatglm"}  # of families that transformers names otherwise
BLOCK = 32  # inputs that share a scale
# Beyond these a float16 overflows: the number itself, a block's scale, or its least number.
LARGEST = {"F16": 65_504.0, "Q8_0": 127 * 65_504.0, "Q4_1": 65_504.0}
MORE_BYTES = 2**20  # no full disk has room for them


@dataclass(frozen=True)
class GgufExport:
    """The result of an export: family, precision, architecture, size, and what was stored otherwise."""

    family: str
    precision: str
    architecture: Architecture  # of one block; importing the file gives it
    size_bytes: int
    copied_layers: int  # that got copies of shared weights
    at_fp16: tuple[str, ...]  # tensors that have no whole blocks


def export_to_gguf(source: Path | str, out: Path | str, precision: str = "fp16") -> GgufExport:
    """Write the checkpoint `source` as the file `out`.

    Raises UnsupportedError (llama.cpp has no such model, tokenizer or precision), ArtefactError, OutputError,
    MissingExtraError.
    """
    require("gguf", "import")
    if precision not in TYPES:
        raise UnsupportedError(f"GGUF has no precision {precision!r} here", names.choose(precision, TYPES))
    ckpt = checkpoint.load(source)
    a = one_block(ckpt.architecture, str(source))
    tokenizer = ckpt.path / "tokenizer.json"
    backend = load_tokenizer(artefact.read_text(tokenizer), str(tokenizer))
    settings = tokenizer_settings(a, backend, ckpt.chat)
    values = _vocabulary(a, backend, settings, ckpt, str(source))
    origin = ckpt.training.get("source")
    family = _family(a, values, str(source), origin.get("family", "") if isinstance(origin, dict) else "")
    described, factors = gguf_families.write(a, family)
    values |= described
    values |= {"merino_edge.version": __version__, "merino_edge.checkpoint_sha256": ckpt.training["sha256"]}
    weights = _renamed(a, family, one_block_weights(ckpt, a))
    del ckpt
    weights |= {name: (array, False) for name, array in factors.items()}
    at_fp16 = _write(Path(out), family, values, weights, precision)
    copied = a.layers - sum(block.weight_layers for block in checkpoint.describe(source)[0].blocks)
    return GgufExport(family, precision, a, Path(out).stat().st_size, copied, at_fp16)


def _vocabulary(
    a: Architecture, backend: tokenizers.Tokenizer, settings: dict[str, Any], ckpt: checkpoint.Checkpoint, where: str
) -> dict[str, Any]:
    ends = list(ckpt.chat.eos_token_ids)
    bos = None if settings["bos_token"] is None else backend.token_to_id(settings["bos_token"])
    special = {
        "bos": ckpt.chat.bos_token_id if bos is None else bos,
        "eos": ends[0] if ends else None,
        "eot": ends[1] if len(ends) > 1 else None,
        "eom": ends[2] if len(ends) > 2 else None,  # llama.cpp ends an answer at any of the three
    }
    adds_bos = ckpt.chat.bos_token_id is not None
    values = gguf_vocabulary.describe(backend, special, a.vocab_size, adds_bos=adds_bos, where=where)
    template = settings.get("chat_template")
    return values if template is None else {**values, "tokenizer.chat_template": template}


def _family(a: Architecture, vocabulary: dict[str, Any], where: str, origin: str) -> str:
    """A family of GGUF that expresses all of `a`, its rotary factors in float32: `origin`'s if it does.

    Raises UnsupportedError.
    """
    wanted = {**flat(a), "rotary_factors": gguf_rope.as_factors(np.array(a.rotary_factors))}
    preferred = NAMES.get(origin, origin)
    nearest, other = "", dict.fromkeys(wanted)

    def rank(name: str) -> tuple[bool, bool]:
        """A family that always has these biases comes before one that may have them."""
        return name != preferred, a.bias != "none" and gguf_families.FAMILIES[name].biases != "as the fields say"

    for family in sorted(gguf_families.FAMILIES, key=rank):
        described, factors = gguf_families.write(a, family)
        m = gguf_vocabulary.as_read({**vocabulary, **described}, where)
        stored = gguf_rope.as_factors(next(iter(factors.values()), np.zeros(0)))
        try:
            read_back = flat(gguf_families.read(m, family, [*_names(a, family), *factors], stored)[0])
        except MerinoError:
            continue
        read_back |= gguf_families.wanted(a, family)
        differing = {key: value for key, value in read_back.items() if value != wanted[key]}
        if not differing:
            return family
        if len(differing) < len(other):
            nearest, other = family, differing
    ours, theirs = (", ".join(f"{key} {values[key]}" for key in other) for values in (wanted, other))
    raise UnsupportedError(
        f"{where}: no family of GGUF has {ours}; the nearest, {nearest}, has {theirs}",
        f"run it as a bundle (merino-edge export {where} --out BUNDLE), or search within --family llama",
    )


# --- tensors ---------------------------------------------------------------------------------------


def _names(a: Architecture, family: str) -> dict[str, tuple[str, ...]]:
    """The names of a family's tensors for `a`, and the names of our weights in each."""
    expected, found = weight_shapes(a), dict[str, tuple[str, ...]]()
    for module, parts in layout_modules(a, gguf_families.FAMILIES[family].layout):
        for kind in ("weight", "bias"):
            ours = tuple(f"{part}.{kind}" for part in parts)
            if all(name in expected for name in ours):
                found[f"{module}.{kind}"] = ours
    return found


def _renamed(a: Architecture, family: str, weights: Weights) -> dict[str, tuple[np.ndarray, bool]]:
    """A family's tensors from our weights, and whether each is embedding or head."""
    stored = gguf_families.tensors(a, family, weights)
    return {
        name: (gguf_families.fused(a, family, ours, [stored[part] for part in ours]), ours[0] in ENDS)
        for name, ours in _names(a, family).items()
    }


def _write(
    out: Path, family: str, values: dict[str, Any], weights: dict[str, tuple[np.ndarray, bool]], precision: str
) -> tuple[str, ...]:
    """Write the file. Returns the names of the matrices that have no whole blocks. Raises OutputError."""
    import gguf

    at_fp16 = []
    with atomic.new_file(out, GGUF) as hidden:
        file = gguf.GGUFWriter(str(hidden), family)
        file.add_type("model")
        file.add_name(out.stem)
        file.add_file_type(_file_type(precision))
        if precision.startswith("int"):
            file.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in values.items():
            _add(file, key, value)
        for name, (array, is_end) in weights.items():
            stored = _type(name, array, precision, is_end=is_end)
            if stored == "F16" and precision.startswith("int"):
                at_fp16.append(name)
            kind = gguf.GGMLQuantizationType[stored]
            plain = np.ascontiguousarray(array, np.float32)
            if plain.size and np.abs(plain).max() > LARGEST.get(stored, np.inf):
                finer = "fp32" if stored == "Q8_0" else "fp32 or int8"
                raise ArtefactError(f"{name} holds numbers beyond float16", f"export it with --precision {finer}")
            file.add_tensor(name, gguf.quants.quantize(plain, kind), raw_dtype=kind)
        try:
            file.write_header_to_file()
            file.write_kv_data_to_file()
            file.write_tensors_to_file()
        except OSError as error:
            if error.errno is None:  # numpy does not say why it wrote too little: writing on tells
                with open(hidden, "ab") as again:
                    again.write(bytes(MORE_BYTES))
            raise
        finally:
            file.close()
    return tuple(at_fp16)


def _type(name: str, array: np.ndarray, precision: str, *, is_end: bool) -> str:
    if array.ndim == 1 or name.startswith("position") or "shortconv.conv" in name:
        return "F32"
    if precision.startswith("int") and array.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if precision == "int4" and is_end else TYPES[precision]


def _file_type(precision: str) -> int:
    import gguf

    kinds = gguf.LlamaFileType
    return int(
        {
            "fp32": kinds.ALL_F32,
            "fp16": kinds.MOSTLY_F16,
            "int8": kinds.MOSTLY_Q8_0,
            "int4": kinds.MOSTLY_Q4_1,
        }[precision]
    )


def _add(file: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        file.add_bool(key, value)
    elif isinstance(value, int):
        file.add_uint32(key, value)
    elif isinstance(value, float):
        file.add_float32(key, value)
    elif isinstance(value, str):
        file.add_string(key, value)
    elif isinstance(value, np.ndarray):  # bytes
        file.add_precompiled_charsmap(value.tobytes())
    else:
        file.add_array(key, value)
