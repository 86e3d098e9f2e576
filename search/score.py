"""The scores that a search maximises, and the interface for a user's own score.

| `--score` | what a block adds | source |
|---|---|---|
| paper, effective | its entropy, weighted for depth | the paper, sections 3 and 4 |
| cut | the same, but no wider than the narrowest width before it | paper section 9 |
| exit | the same as effective; the sum is multiplied by a power of the last block's width | docs/study.md |
| calibrated | short for `exit:shared_layer=0.1` | docs/study.md |
| counting | its parameters, a repeated layer as a tenth; multiplied in the same way; the default | docs/study.md |
| parameters | its stored parameters | LiteTransformerSearch: decoder parameter count |
| flops | its FLOPs over 1024 tokens | - |
| MODULE:NAME, FILE.py:NAME | the result of NAME(model, block, depth, cut) | a user's own, additive: solved exactly |
| the same | NAME(architecture) scores a whole model | a user's own: evolution or brute force |

Options follow a colon, as `effective:epsilon_squared=300,effectiveness_power=2` (`entropy.Hyperparameters`). `exit`
also has `exit_power`; `counting` has `shared_layer` and `exit_power`.

An additive score is a sum over blocks once the total depth and the cut are known. The cut is the narrowest width that
every signal passes through. Widths do not decrease, so it is the width of the embedding or of the first block. The sum
may have a factor that depends on the last block's width. A score sees no budget, no cost, no vocabulary, no context and
no training. Two models that differ only in these tie.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge import artefact, counts, names
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.search.entropy import Hyperparameters, depth_penalty, layer_entropy

FLOPS_SEQUENCE = 1024
# A layer's entropy is rounded to this, in nats. Then sums are exact, and equal scores are equal on any machine.
RESOLUTION = 2.0**-20
FACTOR_BITS = 12  # precision of a score's factor, so low that products are exact

EXIT_POWER = 0.75  # the median of the best fits to random halves of the models in docs/study.md
SHARED_LAYER = 0.1  # what a layer with the weights of an earlier one counts, by the same page
SHORT = {"paper": "effective", "calibrated": f"exit:shared_layer={SHARED_LAYER!r}"}
DEFAULT = "counting"

# What rounding costs is a multiple of this, as every sum of layers is: a shared layer may count as a 1024th.
LOST_RESOLUTION = RESOLUTION / 1024

Floats = NDArray[np.float64]
BlockScore = Callable[[Architecture, Block, int, int], float]  # (model, block, total depth, cut)


@dataclass(frozen=True)
class Score:
    """A function of architectures that a search maximises.

    An additive score has `block`, any other score has `whole`; one of the two is None. `spec` is its command-line form.
    """

    spec: str
    block: BlockScore | None = None
    whole: Callable[[Architecture], float] | None = None
    last: Callable[[int], float] | None = None  # the factor of an additive score, from the last block's width
    uses_cut: bool = False
    sees_ffn_only: bool = False  # whether it depends on no field of the model template except the FFN kind
    sees_depth: bool = True  # whether a block's score depends on the total depth
    details: dict[str, Any] = field(default_factory=dict)  # for the artefact: constants, or a source's hash

    def total(self, a: Architecture, lost: Sequence[float] = ()) -> float:
        """The score of `a`. `lost`: of each block's score, the share that rounding its weights costs.

        Raises InputError where a user's function fails or returns no number.
        """
        if self.whole is not None:
            return self._number(self.whole, a)
        assert self.block is not None
        cut = narrowest_cut(a)
        return self.factor(a.blocks[-1].width) * math.fsum(
            self.block_total(a, block, a.layers, cut, share)
            for block, share in zip(a.blocks, lost or [0.0] * len(a.blocks), strict=True)
        )

    def factor(self, last_width: int) -> float:
        """The factor of the sum over blocks."""
        return 1.0 if self.last is None else self.last(last_width)

    def block_total(self, model: Architecture, block: Block, depth: int, cut: int, lost: float = 0.0) -> float:
        """What `block` adds to a model of `depth` layers, behind a cut of width `cut`, less the share `lost` of it."""
        assert self.block is not None
        value = self._number(self.block, model, block, depth, cut)
        return float(after_rounding(np.asarray(value), np.asarray(lost))) if lost else value

    def _number(self, function: Callable[..., float], *arguments: Any) -> float:
        try:
            value = float(function(*arguments))
        except Exception as error:  # whatever a user's function raises
            raise InputError(f"score {self.spec} failed ({type(error).__name__}: {error})", "correct it") from error
        if not math.isfinite(value):
            raise InputError(f"score {self.spec} returned {value}", "it must return a finite number")
        return value


def after_rounding(value: Floats, lost: Floats) -> Floats:
    """Blocks' scores `value`, less the share `lost` of their size. The difference is a multiple of LOST_RESOLUTION."""
    return np.asarray(value - np.rint(lost * np.abs(value) / LOST_RESOLUTION) * LOST_RESOLUTION)


def narrowest_cut(a: Architecture) -> int:
    """The narrowest width that every signal passes through."""
    return min(a.embedding_width, a.blocks[0].width)


# --- the built-in scores ---------------------------------------------------------------------------


def effective(hyperparameters: Hyperparameters | None = None, *, cut: bool = False) -> Score:
    """The paper's effective entropy, in nats. With `cut` no matrix counts wider than the narrowest cut."""
    constants = hyperparameters or Hyperparameters()
    layer = functools.lru_cache(maxsize=None)(functools.partial(_layer_score, constants))

    def block_score(model: Architecture, block: Block, depth: int, narrowest: int) -> float:
        shape = (block.width, block.kv_heads * model.head_dim, block.ffn_width)
        score = layer(shape, gated=model.gated, depth=depth, cut=narrowest if cut else None)
        return constants.counted_layers(block) * score

    values = {f.name: getattr(constants, f.name) for f in dataclasses.fields(constants)}
    changed = [f"{f.name}={values[f.name]!r}" for f in dataclasses.fields(constants) if values[f.name] != f.default]
    spec = ("cut" if cut else "effective") + (f":{','.join(changed)}" if changed else "")
    return Score(spec, block_score, uses_cut=cut, sees_ffn_only=True, details={"hyperparameters": values})


def at_exit(hyperparameters: Hyperparameters | None = None, power: float = EXIT_POWER) -> Score:
    """Effective entropy times (width of the last block)^`power`, because the head sees only that width."""
    inner = effective(hyperparameters)
    options = [inner.spec.partition(":")[2], *([f"exit_power={power!r}"] if power != EXIT_POWER else [])]
    spec = ":".join(filter(None, ("exit", ",".join(filter(None, options)))))
    details = {**inner.details, "exit_power": power}
    return dataclasses.replace(inner, spec=spec, last=functools.partial(exit_factor, power), details=details)


def counting(shared_layer: float = SHARED_LAYER, power: float = EXIT_POWER) -> Score:
    """Parameters of the layers times (width of the last block)^`power`; a repeated layer counts `shared_layer`.

    It has the two parts of `exit` and no entropy. Trained models agree with it where the two differ (docs/study.md).
    """
    constants = Hyperparameters(shared_layer=shared_layer)

    def block_score(model: Architecture, block: Block, depth: int, cut: int) -> float:
        layer = counts.block_parameters(model, dataclasses.replace(block, layers=1))
        return constants.counted_layers(block) * layer

    values = {"shared_layer": shared_layer, "exit_power": power}
    changed = [
        f"{name}={value!r}"
        for (name, value), usual in zip(values.items(), (SHARED_LAYER, EXIT_POWER), strict=True)
        if value != usual
    ]
    spec = ":".join(filter(None, ("counting", ",".join(changed))))
    last = functools.partial(exit_factor, power)
    return Score(spec, block_score, last=last, sees_ffn_only=True, sees_depth=False, details=values)


def exit_factor(power: float, width: int) -> float:
    """width^power, rounded to FACTOR_BITS bits."""
    mantissa, exponent = math.frexp(float(width) ** power)
    return math.ldexp(round(mantissa * 2**FACTOR_BITS), exponent - FACTOR_BITS)


def _layer_score(
    constants: Hyperparameters, shape: tuple[int, int, int], *, gated: bool, depth: int, cut: int | None
) -> float:
    """The score of one layer of `shape` (width, KV width, FFN width), in nats."""
    width, kv_width, ffn_width = shape
    mha, ffn = layer_entropy(width, kv_width, ffn_width, constants.epsilon_squared, gated=gated, cut=cut)
    mha *= constants.alpha_mha * depth_penalty(depth, width, constants)
    ffn *= constants.alpha_ffn * depth_penalty(depth, ffn_width, constants)
    return round((mha + ffn) / RESOLUTION) * RESOLUTION


_PLAIN = functools.partial(Score, sees_ffn_only=True, sees_depth=False)
PARAMETERS = _PLAIN("parameters", lambda a, block, depth, cut: counts.block_parameters(a, block))
FLOPS = _PLAIN("flops", lambda a, block, depth, cut: counts.block_flops(a, block, FLOPS_SEQUENCE))


def parse_score(spec: str) -> Score:
    """The score that `spec` names. Raises InputError."""
    name, _, options = spec.partition(":") if isinstance(spec, str) else (None, "", "")
    if not options or "=" in options:  # else it may be a module
        name = names.find(name, BUILT_IN) or name
    if name in SHORT:
        head, _, constants = SHORT[name].partition(":")
        return parse_score(f"{head}:{','.join(filter(None, (constants, options)))}")
    if name in ("effective", "cut"):
        return effective(Hyperparameters(**_options(options, spec, _CONSTANTS)), cut=name == "cut")
    if name == "exit":
        values = _options(options, spec, [*_CONSTANTS, "exit_power"])
        power = _exit_power(values, spec)
        return at_exit(Hyperparameters(**values), power)
    if name == "counting":
        values = _options(options, spec, ["shared_layer", "exit_power"])
        power = _exit_power(values, spec)
        return counting(values.get("shared_layer", SHARED_LAYER), power)
    plain = {"parameters": PARAMETERS, "flops": FLOPS}
    if name in plain and not options:
        return plain[name]
    if name in plain or not options.isidentifier():
        hint = names.choose(name, BUILT_IN, ", MODULE:NAME or FILE.py:NAME")
        raise InputError(f"there is no score {spec!r}", hint)
    return _user_score(spec, *spec.rsplit(":", 1))


BUILT_IN = (*SHORT, "effective", "cut", "exit", "counting", "parameters", "flops")
_CONSTANTS = [f.name for f in dataclasses.fields(Hyperparameters)]


def is_users(spec: str) -> bool:
    """Whether `spec` names a user's function. To parse it runs its file."""
    name, mark, _ = spec.partition(":")
    return bool(mark) and name not in BUILT_IN


def _exit_power(values: dict[str, float], spec: str) -> float:
    """Take `exit_power` out of a score's options."""
    power = values.pop("exit_power", EXIT_POWER)
    if not 0 <= power <= 4:
        raise InputError(f"score {spec!r}: exit_power is {power:g}", "give 0 to 4")
    return power


def _options(options: str, spec: str, names: list[str]) -> dict[str, float]:
    """The options after a score's colon, by name."""
    values = {}
    for option in filter(None, options.split(",")):
        name, _, text = option.partition("=")
        try:
            values[name.strip()] = float(text)
        except ValueError:
            raise InputError(f"score {spec!r}: {option!r} is no option", "write NAME=NUMBER") from None
    if unknown := sorted(set(values) - set(names)):
        raise InputError(f"score {spec!r} has no option {', '.join(unknown)}", f"it has {', '.join(sorted(names))}")
    return values


# --- a user's own ----------------------------------------------------------------------------------


def _user_score(spec: str, module_name: str, name: str) -> Score:
    """A score from a user's function. One of (model, block, depth, cut) is additive; one of (architecture) is not."""
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
        source = importlib.util.spec_from_file_location(Path(name).stem, name)
        if source is None or source.loader is None or not Path(name).is_file():
            raise InputError(f"score {spec!r}: {name} does not exist", "check the path")
        module = importlib.util.module_from_spec(source)
        sys.modules.setdefault(source.name, module)  # so that dataclasses in it work
        source.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as error:  # whatever importing a user's file raises
        raise InputError(f"score {spec!r} cannot be loaded ({type(error).__name__}: {error})", "correct it") from error
