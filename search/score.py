"""What a search maximises, in one place: every score, and the interface for a user's own.

| `--score` | a block adds | from |
|---|---|---|
| effective | its entropy, weighted for depth | the paper, sections 3 and 4 |
| cut | the same, but counted only as wide as the narrowest width before it | paper section 9 |
| exit | the same as effective; their sum is multiplied by a power of the last block's width | docs/study.md |
| parameters | its stored parameters | LiteTransformerSearch: decoder parameter count |
| flops | its FLOPs over 1024 tokens | - |
| MODULE:NAME, FILE.py:NAME | what NAME(model, block, depth, cut) returns | a user's own, additive: solved exactly |
| the same | NAME(architecture) as a whole | a user's own: evolution, or a space small enough to enumerate |

Options follow a colon, as `effective:epsilon_squared=300,effectiveness_power=2` (`entropy.Hyperparameters`; `exit` has
`exit_power` too).

An additive score is a sum over blocks once the total depth and the cut are known: the cut is the narrowest width that
everything passes through, which is the embedding's or the first block's, since widths do not decrease. What the sum is
multiplied by may depend on the last block's width. A score is told neither budgets nor costs. It sees no vocabulary, no
context, no training: two models that differ only there tie.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merino_edge import artefact, counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.search.entropy import Hyperparameters, depth_penalty, layer_entropy

FLOPS_SEQUENCE = 1024
# Of a layer's entropy, in nats: sums are then exact, and what ties on paper ties here, on any machine.
RESOLUTION = 2.0**-20
FACTOR_BITS = 12  # of what a sum is multiplied by: few enough that products are exact

EXIT_POWER = 0.75  # the median of what halves of the models of docs/study.md were fitted best by

BlockScore = Callable[[Architecture, Block, int, int], float]  # (model, block, total depth, cut)


@dataclass(frozen=True)
class Score:
    """`block` of an additive score, `whole` of any other; one of them is None. `spec` is what the command line says."""

    spec: str
    block: BlockScore | None = None
    whole: Callable[[Architecture], float] | None = None
    last: Callable[[int], float] | None = None  # what an additive score is multiplied by, given the last block's width
    uses_cut: bool = False
    sees_ffn_only: bool = False  # sees the FFN kind of a frame and nothing else
    details: dict[str, Any] = field(default_factory=dict)  # for the artefact: constants, or a source's hash

    def total(self, a: Architecture) -> float:
        """The score of `a`. Raises InputError where a user's function fails or returns no number."""
        if self.whole is not None:
            return self._number(self.whole, a)
        assert self.block is not None
        cut = narrowest_cut(a)
        return self.factor(a.blocks[-1].width) * math.fsum(
            self.block_total(a, block, a.layers, cut) for block in a.blocks
        )

    def factor(self, last_width: int) -> float:
        """What the sum over blocks is multiplied by."""
        return 1.0 if self.last is None else self.last(last_width)

    def block_total(self, model: Architecture, block: Block, depth: int, cut: int) -> float:
        """What `block` adds to a model `depth` layers deep behind a cut of width `cut`."""
        assert self.block is not None
        return self._number(self.block, model, block, depth, cut)

    def _number(self, function: Callable[..., float], *arguments: Any) -> float:
        try:
            value = float(function(*arguments))
        except Exception as error:  # whatever a user's function raises
            raise InputError(f"score {self.spec} failed ({type(error).__name__}: {error})", "correct it") from error
        if not math.isfinite(value):
            raise InputError(f"score {self.spec} returned {value}", "it must return a finite number")
        return value


def narrowest_cut(a: Architecture) -> int:
    return min(a.embedding_width, a.blocks[0].width)


# --- the built-in scores ---------------------------------------------------------------------------


def effective(hyperparameters: Hyperparameters | None = None, cut: bool = False) -> Score:
    """The paper's effective entropy, in nats; with `cut`, behind the narrowest cut."""
    constants = hyperparameters or Hyperparameters()
    layer = functools.lru_cache(maxsize=None)(functools.partial(_layer_score, constants))

    def block_score(model: Architecture, block: Block, depth: int, narrowest: int) -> float:
        shape = (model.head_dim, model.gated, block.width, block.kv_heads, block.ffn_width)
        return constants.counted_layers(block) * layer(*shape, depth, narrowest if cut else None)

    own = {f.name: getattr(constants, f.name) for f in dataclasses.fields(constants)}
    changed = [f"{f.name}={own[f.name]!r}" for f in dataclasses.fields(constants) if own[f.name] != f.default]
    spec = ("cut" if cut else "effective") + (f":{','.join(changed)}" if changed else "")
    return Score(spec, block_score, uses_cut=cut, sees_ffn_only=True, details={"hyperparameters": own})


def at_exit(hyperparameters: Hyperparameters | None = None, power: float = EXIT_POWER) -> Score:
    """Effective entropy times (width of the last block)^`power`: that width is all that the head gets to see."""
    inner = effective(hyperparameters)
    options = [inner.spec.partition(":")[2], *([f"exit_power={power!r}"] if power != EXIT_POWER else [])]
    spec = ":".join(filter(None, ("exit", ",".join(filter(None, options)))))
    details = {**inner.details, "exit_power": power}
    return dataclasses.replace(inner, spec=spec, last=functools.partial(exit_factor, power), details=details)


def exit_factor(power: float, width: int) -> float:
    """width^power to FACTOR_BITS bits."""
    mantissa, exponent = math.frexp(float(width) ** power)
    return math.ldexp(round(mantissa * 2**FACTOR_BITS), exponent - FACTOR_BITS)


def _layer_score(
    constants: Hyperparameters,
    head_dim: int,
    gated: bool,
    width: int,
    kv_heads: int,
    ffn_width: int,
    depth: int,
    cut: int | None,
) -> float:
    mha, ffn = layer_entropy(width, kv_heads * head_dim, ffn_width, gated, constants.epsilon_squared, cut)
    mha *= constants.alpha_mha * depth_penalty(depth, width, constants)
    ffn *= constants.alpha_ffn * depth_penalty(depth, ffn_width, constants)
    return round((mha + ffn) / RESOLUTION) * RESOLUTION


PARAMETERS = Score("parameters", lambda a, block, depth, cut: counts.block_parameters(a, block), sees_ffn_only=True)
FLOPS = Score("flops", lambda a, block, depth, cut: counts.block_flops(a, block, FLOPS_SEQUENCE), sees_ffn_only=True)


def parse_score(spec: str) -> Score:
    """The score that `spec` names. Raises InputError."""
    name, _, options = spec.partition(":")
    if name in ("effective", "cut"):
        return effective(Hyperparameters(**_options(options, spec)), cut=name == "cut")
    if name == "exit":
        values = _options(options, spec, "exit_power")
        power = values.pop("exit_power", EXIT_POWER)
        if not 0 <= power <= 4:
            raise InputError(f"score {spec!r}: exit_power is {power:g}", "give 0 to 4")
        return at_exit(Hyperparameters(**values), power)
    plain = {"parameters": PARAMETERS, "flops": FLOPS}
    if name in plain and not options:
        return plain[name]
    if not options or not options.isidentifier():
        raise InputError(
            f"there is no score {spec!r}", "choose effective, cut, exit, parameters, flops, MODULE:NAME or FILE.py:NAME"
        )
    return _user_score(spec, *spec.rsplit(":", 1))


def _options(options: str, spec: str, *more: str) -> dict[str, float]:
    """What follows a score's colon, by name: fields of Hyperparameters, or one of `more`."""
    names = {*(f.name for f in dataclasses.fields(Hyperparameters)), *more}
    values = {}
    for option in filter(None, options.split(",")):
        name, _, text = option.partition("=")
        try:
            values[name.strip()] = float(text)
        except ValueError:
            raise InputError(f"score {spec!r}: {option!r} is no option", "write NAME=NUMBER") from None
    if unknown := sorted(set(values) - names):
        raise InputError(f"score {spec!r} has no option {', '.join(unknown)}", f"it has {', '.join(sorted(names))}")
    return values


# --- a user's own ----------------------------------------------------------------------------------


def _user_score(spec: str, module_name: str, name: str) -> Score:
    """A function of the user's: (model, block, depth, cut) is additive, (architecture) is not."""
    module = _module(module_name, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"score {spec!r}: {module_name} has no function {name}", "define it there")
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    source = Path(inspect.getsourcefile(module) or "")
    details = {"source_sha256": artefact.sha256_file(source) if source.is_file() else None}
    if len(needed) == 4:
        return Score(spec, function, uses_cut=True, details=details)
    if len(needed) == 1:
        return Score(spec, whole=function, details=details)
    raise InputError(
        f"score {spec!r} takes {len(needed)} arguments", "write NAME(model, block, depth, cut) or NAME(architecture)"
    )


def _module(name: str, spec: str) -> Any:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        found = importlib.util.spec_from_file_location(Path(name).stem, name)
        if found is None or found.loader is None or not Path(name).is_file():
            raise InputError(f"score {spec!r}: {name} does not exist", "check the path")
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(found.name, module)  # so that dataclasses in it work
        found.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as error:  # whatever importing a user's file raises
        raise InputError(f"score {spec!r} cannot be loaded ({type(error).__name__}: {error})", "correct it") from error
