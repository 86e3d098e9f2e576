"""The built-in search spaces, and `load_space`, which finds a space by its name or reads it from a file.

| name | purpose |
|---|---|
| paper | the paper's Table 5: 304 million architectures, OPT-like layers, no minimum width |
| edge | a Jetson-class board: Llama-like layers, up to 4 blocks, a choice of vocabulary and context |
| wide | every dimension is open, up to 8 blocks |
| demo | small enough to train on two CPU cores in minutes |
| study | many models small enough to train on two CPU cores, including narrow first blocks |
| NAME-FAMILY | its models of one family, such as edge-llama or demo-llama (merino_edge.search.family_space) |

The bytes per token were measured with tokenizers as `merino-edge train` makes them, by the command `python
benchmarks/bytes_per_token.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from merino_edge import artefact, names
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.search import space_file
from merino_edge.search.family_space import FAMILIES, as_family
from merino_edge.search.space import Space, Vocabulary

# Bytes per token of a byte-level BPE on unseen English text, averaged over an encyclopedia, stories and novels.
BYTES_PER_TOKEN = {
    1024: 2.575,
    2048: 2.972,
    4096: 3.350,
    8192: 3.672,
    16384: 3.927,
    32768: 4.105,
    49152: 4.173,
    50272: 4.176,
}


def vocabularies(*sizes: int) -> tuple[Vocabulary, ...]:
    """The vocabularies of these sizes, with their measured bytes per token."""
    return tuple(Vocabulary(size, BYTES_PER_TOKEN[size]) for size in sizes)


_OPT_LIKE = Architecture(vocab_size=1, max_positions=1, embedding_width=1, head_dim=64, blocks=(Block(64, 1, 1, 1, 1),))
_LLAMA_LIKE = dataclasses.replace(_OPT_LIKE, norm="rmsnorm", positions="rotary", rotary_dim=64, bias="none")
_HALVES = (1, 1.5, 2, 2.5, 3, 3.5, 4)

PAPER = Space(
    name="paper",
    blocks=(4,),
    widths=(64, 128, 256, 384, 512, 640, 768, 896, 1024),
    ffn_ratios=_HALVES,
    layers=(1, 2, 3, 4),
    kv_groups=(1,),
    shared=(True,),
    ffn=("relu",),
    embedding_widths=(768,),
    vocabularies=vocabularies(50272),
    contexts=(2048,),
    least_width=0,
    least_embedding=0,
    model=_OPT_LIKE,
)
EDGE = Space(
    name="edge",
    blocks=(1, 2, 3, 4),
    widths=(128, 192, 256, 320, 384, 448, 512, 640, 768),
    ffn_ratios=_HALVES,
    layers=(1, 2, 3, 4, 6, 8),
    kv_groups=(1, 2, 3, 4),
    shared=(False, True),
    ffn=("relu", "swiglu"),
    embedding_widths=(256, 384, 512, 768),
    vocabularies=vocabularies(4096, 8192, 16384, 32768, 49152),
    contexts=(512, 1024, 2048),
    least_width=0.5,
    least_embedding=0.5,
    model=_LLAMA_LIKE,
)
WIDE = Space(
    name="wide",
    blocks=(1, 2, 3, 4, 5, 6, 7, 8),
    widths=tuple(range(64, 1025, 64)),
    ffn_ratios=_HALVES,
    layers=(1, 2, 3, 4, 5, 6),
    kv_groups=(1, 2, 3, 4, 8),
    shared=(False, True),
    ffn=("relu", "swiglu"),
    embedding_widths=(128, 256, 384, 512, 640, 768, 1024),
    vocabularies=vocabularies(1024, 2048, 4096, 8192, 16384, 32768, 49152),
    contexts=(256, 512, 1024, 2048, 4096),
    least_width=0.5,
    least_embedding=0.5,
    model=_LLAMA_LIKE,
)
DEMO = Space(
    name="demo",
    blocks=(3,),
    widths=(128, 192, 256),
    ffn_ratios=(1, 2, 3, 4),
    layers=(1, 2, 3),
    kv_groups=(1,),
    shared=(False,),
    ffn=("swiglu",),
    embedding_widths=(256,),
    vocabularies=vocabularies(4096),
    contexts=(256,),
    least_width=0.5,
    least_embedding=0.5,
    model=dataclasses.replace(_LLAMA_LIKE, head_dim=32, rotary_dim=32, blocks=(Block(32, 1, 1, 1, 1),)),
)
# Many of these models can be trained on a CPU until their size limits their loss. Layers are of the paper's kind. There
# is no minimum width, so that narrow cuts can be studied.
STUDY = Space(
    name="study",
    blocks=(1, 2, 3),
    widths=(32, 48, 64, 96, 128),
    ffn_ratios=(1, 2, 3, 4),
    layers=(1, 2, 3, 4),
    kv_groups=(1,),
    shared=(False,),
    ffn=("relu",),
    embedding_widths=(64,),
    vocabularies=(Vocabulary(512),),
    contexts=(128,),
    least_width=0,
    least_embedding=0,
    model=dataclasses.replace(_OPT_LIKE, head_dim=16, blocks=(Block(16, 1, 1, 1, 1),)),
)

SPACES = {space.name: space for space in (PAPER, EDGE, WIDE, DEMO, STUDY)}


def load_space(name_or_path: str) -> Space:
    """A built-in space by name, or a space file. Raises ArtefactError, InputError, ArchitectureError.

    The name of a built-in space and of a family, such as edge-llama, gives the space's models of that family.
    """
    # The path "" would be the working folder.
    path = Path(name_or_path) if isinstance(name_or_path, (str, Path)) and name_or_path != "" else None
    name = names.find(name_or_path, SPACES)
    if path is not None and name is not None and (name == name_or_path or names.is_missing(path)):
        return SPACES[name]
    base, _, family = str(name_or_path).rpartition("-")
    if path is not None and base in SPACES and family in FAMILIES and names.is_missing(path):
        return as_family(SPACES[base], family)
    if path is None or (not path.suffix and not path.exists()):
        hint = names.choose(name_or_path, SPACES, ", or give a space file")
        raise InputError(f"there is no space {name_or_path!r}", hint)
    document = artefact.read_json(path, space_file.KIND, space_file.SCHEMA_VERSION, handwritten=True)
    space = space_file.from_dict(document, name_or_path, SPACES)
    return dataclasses.replace(space, origin=name_or_path)
