"""A chat template, rendered within bounds of steps, bytes and time.

A template is a program by the model's author. The sandbox of Jinja keeps it from Python, but not from loops without end
or texts of a gigabyte. So the compiled template counts each turn of a loop, each call, filter and operator, and weighs
what they make before it is used again. What would be too large is refused before it is made. What honest templates do
is the same as in transformers (merino_edge.template_language). Jinja's filters for web pages are not there. This
module knows no tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from merino_edge import template_language
from merino_edge.errors import ArtefactError, InputError
from merino_edge.template_budget import TEXTS, Budget, TooMuch
from merino_edge.template_language import Refusal

BUDGET = "the budget of this rendering"  # its name in the context: no name that a template can spell
STEP, MADE, JOINED = " step", " made", " joined"  # our own filters: no template can spell these either
LEFT_OUT = ("urlize", "xmlattr", "striptags", "filesizeformat", "pprint", "random", "wordcount", "wordwrap")
_OPTIONS: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "optimized": False}
_OPTIONS["extensions"] = list(template_language.EXTENSIONS)
MOST_WORDS = 500  # characters of a template's own refusal


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of `template` with `variables`.

    Raises InputError where the template refuses the conversation, with its words. Raises ArtefactError where it fails
    or goes beyond a limit.
    """
    try:
        text = _compiled(template).render({**variables, BUDGET: Budget()})
        text.encode()
    except Refusal as refusal:
        words = " ".join(str(refusal).encode(errors="replace").decode().split())[:MOST_WORDS] or "it does not say why"
        raise InputError(f"the chat template refuses this conversation: {words}", "give other messages") from None
    except Exception as error:  # templates are untrusted, and may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtefactError(
            f"the chat template failed ({reason})", "give a plain text, or import the model again"
        ) from None
    return text


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """The compiled template. It is cached because compiling takes as long as rendering a hundred conversations."""
    return _environment().from_string(template)


def literals(template: str) -> str:
    """What a template writes by itself: its texts and the strings in its code, with a zero character between them.

    Raises ArtefactError where it is no template.
    """
    try:
        tree = _environment().parse(template)
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        strings = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    except Exception as error:  # as in `render`
        raise ArtefactError(f"the chat template failed ({error})", "import the model again") from None
    return "\0".join(texts + strings)


@functools.lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """The names that a template reads and does not make itself. Raises ArtefactError where it is no template."""
    try:
        return frozenset(meta.find_undeclared_variables(jinja2.Environment(**_OPTIONS).parse(template)))
    except Exception as error:  # as in `render`
        raise ArtefactError(f"the chat template failed ({error})", "import the model again") from None


@functools.cache
def _environment() -> _Bounded:
    return _Bounded(**_OPTIONS)


def _budget(context: Context) -> Budget:
    budget = context.get(BUDGET)
    assert isinstance(budget, Budget)
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
        raise TooMuch("it prints a namespace")
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
        known = {**self.filters, "tojson": template_language.tojson}
        self.filters = {n: _counted(n, f) for n, f in known.items() if n not in LEFT_OUT}
        self.filters |= {STEP: _step, MADE: _made, JOINED: _joined}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = template_language.raise_exception
        self.globals["strftime_now"] = template_language.strftime_now

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
