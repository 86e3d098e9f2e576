"""A chat template, rendered within bounds of steps, bytes and time.

A template is a program by the model's author. The sandbox of Jinja keeps it from Python, but not from loops without end
or texts of a gigabyte. So the compiled template counts each turn of a loop, each call, filter and operator, and weighs
what they make before it is used again. What would be too large is refused before it is made. What honest templates do
is the same as in Jinja's own sandbox. Jinja's filters for web pages are not there. This module knows no tokenizer.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from merino_edge import limits
from merino_edge.errors import ArtefactError

BUDGET = "the budget of this rendering"  # its name in the context: no name that a template can spell
STEP, MADE, JOINED = " step", " made", " joined"  # our own filters: no template can spell these either
LEFT_OUT = ("urlize", "xmlattr", "striptags", "filesizeformat", "pprint", "random", "wordcount", "wordwrap")
LARGEST_NUMBER = 1_000_000  # among the arguments of a call, such as a width or a count
MOST_BITS = 4096  # of a whole number
ELEMENT = 16  # what an element of a container weighs, at least, in characters
STEPS_BETWEEN_CLOCKS = 16
TEXTS = (str, bytes)
VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
SIZED: Any = (*TEXTS, *VIEWS, list, tuple, dict, set, frozenset)
NUMBERS, FIELD = re.compile(r"\d+"), re.compile(r"%(?:\([^)]*\))?[^%a-zA-Z]*|\{[^}]*")  # of a formatted text
WIDTH_BY_ARGUMENT = re.compile(r"%[^%a-zA-Z]*\*|\{[^}]*\{")
HUGE = 2**60
FROM_THE_RIGHT = ("rfind", "rindex", "rsplit", "rpartition")  # Python searches these by the square of the lengths
MOST_COMPARISONS = 10**8


class _TooMuch(Exception):
    """The template goes beyond a limit. The text says which."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of `template` with `variables`. Raises ArtefactError where it fails or goes beyond a limit."""
    try:
        text = _compiled(template).render({**variables, BUDGET: _Budget()})
        text.encode()
    except Exception as error:  # templates are untrusted, and may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtefactError(
            f"the chat template failed ({reason})", "give a plain text, or import the model again"
        ) from None
    return text


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """The compiled template. It is cached because compiling takes as long as rendering a hundred conversations."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, optimized=False)
    return environment.from_string(template, globals={"raise_exception": raise_exception})


# --- the budget of one rendering -------------------------------------------------------------------


class _Budget:
    """Counts the steps and the characters of one rendering. Its methods raise _TooMuch."""

    def __init__(self) -> None:
        self._steps = self._made = 0
        self._end = time.thread_time() + limits.MAX_TEMPLATE_SECONDS
        # The weight of each container, which no template can change. It is kept, so that its id stays its own.
        self._weights: dict[int, tuple[Any, int]] = {}

    def step(self) -> None:
        self._steps += 1
        if self._steps > limits.MAX_TEMPLATE_STEPS:
            raise _TooMuch(f"it takes more than {limits.MAX_TEMPLATE_STEPS} steps")
        if self._steps % STEPS_BETWEEN_CLOCKS == 0 and time.thread_time() > self._end:
            raise _TooMuch(f"it takes more than {limits.MAX_TEMPLATE_SECONDS:.0f} s")

    def made(self, value: Any) -> Any:
        """`value`, which the template has just made."""
        self.require(self.weight(value))
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise _TooMuch(f"it makes a number of more than {MOST_BITS} bits")
        if isinstance(value, SIZED):  # what is in a container was counted when it was made itself
            self._made += len(value) * (1 if isinstance(value, TEXTS) else ELEMENT)
        if self._made > limits.MAX_TEMPLATE_MADE:
            raise _TooMuch(f"it makes more than {limits.MAX_TEMPLATE_MADE} characters")
        return value

    def require(self, characters: float) -> None:
        """Refuse a value of this weight."""
        if characters > limits.MAX_TEMPLATE_VALUE:
            raise _TooMuch(f"it makes a value of more than {limits.MAX_TEMPLATE_VALUE} characters")

    def weight(self, value: Any) -> int:
        """The characters that `value` takes when it is printed, about: what is in it twice counts twice."""
        if isinstance(value, TEXTS):
            return ELEMENT + len(value)
        if not isinstance(value, SIZED):
            return ELEMENT
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        total = ELEMENT
        for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            if isinstance(part, Namespace):  # it can change, so it has no weight
                raise _TooMuch("it puts a namespace into a list")
            total += self.weight(part)
            self.require(total)
        self._weights[id(value)] = value, total
        return total

    def drained(self, value: Any) -> Any:
        """An iterator whose elements are weighed together, as whoever takes them all would hold them."""
        if not isinstance(value, Iterator) or isinstance(value, LoopContext):
            return value
        return iter(self.made(list(islice(value, limits.MAX_TEMPLATE_VALUE // ELEMENT))))

    def filter(self, name: str, own: Any, others: list[Any]) -> None:
        """Refuse a filter of `own` whose result would be too large."""
        self.require(sum(map(self.weight, [own, *others])))
        if isinstance(own, Namespace):
            raise _TooMuch(f"{name} gets a namespace")
        largest, texts = _largest_number(name, others), [value for value in others if isinstance(value, TEXTS)]
        if name == "tojson":
            self.require(self.weight(own) * max(largest, *map(len, texts), 1))
        elif name == "indent":
            self.require(self.weight(own) + (str(own).count("\n") + 1) * max(largest, *map(len, texts), 4))
        elif name == "join" and isinstance(own, SIZED):
            self.require(self.weight(own) + len(own) * sum(map(len, texts)))
        elif name == "replace" and len(texts) > 1:
            self._replace(str(own), str(texts[0]), str(texts[1]))
        elif name == "format":
            self._format(str(own), others)
        elif name == "sum" and any(isinstance(value, SIZED) and not isinstance(value, TEXTS) for value in others):
            raise _TooMuch("it sums lists")

    def method(self, name: str, own: str | bytes | int, others: list[Any]) -> None:
        """Refuse a call of a method of `own` whose result would be too large."""
        largest = _largest_number(name, others)
        if isinstance(own, int):
            return
        if name == "join" and others and isinstance(others[0], SIZED):
            self.require(self.weight(others[0]) + len(others[0]) * len(own))
        elif name == "replace" and len(others) > 1:
            self._replace(own, others[0], others[1])
        elif name == "expandtabs":
            self.require(len(own) * max(largest, 8))
        elif name in ("format", "format_map"):
            self._format(str(own), others)
        elif name in ("translate", "maketrans"):
            raise _TooMuch(f"{name} is not for chat templates")
        elif name in FROM_THE_RIGHT and len(own) * max(map(_length, others), default=0) > MOST_COMPARISONS:
            raise _TooMuch(f"{name} looks for a long text in a long text")

    def operator(self, name: str, left: Any, right: Any) -> None:
        """Refuse an operator whose result would be too large."""
        if name == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, SIZED) and isinstance(count, int):
                    self.require(self.weight(value) * count)
        if name == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MOST_BITS:
                raise _TooMuch(f"it makes a number of more than {MOST_BITS} bits")
        elif name == "%" and isinstance(left, TEXTS):
            self._format(str(left), list(right) if isinstance(right, tuple) else [right])

    def _replace(self, text: str | bytes, old: Any, new: Any) -> None:
        if isinstance(old, type(text)) and isinstance(new, type(text)):  # else Python refuses
            count = text.count(old) if old else len(text) + 1  # type: ignore[arg-type]
            self.require(len(text) + count * len(new))

    def _format(self, pattern: str, arguments: list[Any]) -> None:
        """Each field of a pattern can be as wide as its width or its value; a width can be an argument."""
        if any(isinstance(value, Namespace) for value in arguments):
            raise _TooMuch("it formats a namespace")
        fields = FIELD.findall(pattern)
        widths = [int(digits) if len(digits) < 9 else HUGE for field in fields for digits in NUMBERS.findall(field)]
        if WIDTH_BY_ARGUMENT.search(pattern):
            widths += [HUGE if isinstance(value, SIZED) else _absolute(value) for value in arguments]
        self.require(len(pattern) + len(fields) * (max(widths, default=0) + sum(map(self.weight, arguments))))


def _absolute(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, TEXTS) else 0


def _largest_number(name: str, values: list[Any]) -> int:
    """The largest whole number among arguments, such as a width or a count."""
    if (largest := max(map(_absolute, values), default=0)) > LARGEST_NUMBER:
        raise _TooMuch(f"{name} gets a number over {LARGEST_NUMBER}")
    return largest


def _budget(context: Context) -> _Budget:
    budget = context.get(BUDGET)
    assert isinstance(budget, _Budget)
    return budget


# --- Jinja, with our counts in the compiled template -----------------------------------------------


@jinja2.pass_context
def _step(context: Context, value: Any) -> Any:
    _budget(context).step()
    return value


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    budget = _budget(context)
    budget.step()
    if isinstance(value, Namespace):
        raise _TooMuch("it prints a namespace")
    return budget.made(value)


@jinja2.pass_context
def _joined(context: Context, values: list[Any]) -> str:
    """The operator `~`: its values were weighed as a list."""
    joined: str = _budget(context).made((markup_join if context.eval_ctx.autoescape else str_join)(values))
    return joined


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja that counts as a step, and whose arguments and result are weighed."""
    passes = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @jinja2.pass_context
    def counted(context: Context, *arguments: Any, **options: Any) -> Any:
        budget = _budget(context)
        budget.step()
        arguments = tuple(budget.drained(value) for value in arguments)
        budget.filter(name, arguments[0], [*arguments[1:], *options.values()])
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}
        return budget.made(function(*first.get(passes, ()), *arguments, **options))

    return counted


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose templates count and weigh what they do."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {n: _counted(n, f) for n, f in self.filters.items() if n not in LEFT_OUT}
        self.filters |= {STEP: _step, MADE: _made, JOINED: _joined}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counting: nodes.Template = _Counting().visit(tree)
        counting.set_environment(self)
        return counting

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.step()
        budget.operator(operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.step()
        args = tuple(budget.drained(value) for value in args)
        given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        budget.require(sum(map(budget.weight, [*args, *given.values()])))
        bound = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        own = getattr(bound, "__self__", None)
        if isinstance(own, (*TEXTS, int)):
            budget.method(bound.__name__, own, [*args, *given.values()])
        return budget.made(super().call(__context, __obj, *args, **kwargs))


class _Counting(NodeTransformer):
    """Puts our filters into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), STEP), lineno=node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(child, MADE) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return _filtered(_filtered(values, MADE), JOINED)

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, MADE, node.lineno)
        return node


def _filtered(node: nodes.Expr | None, name: str, lineno: int = 0) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno if node is not None else lineno)
