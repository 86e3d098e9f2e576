"""Forms: what the fields of a JSON document must be, declared as types and checked in one call.

Each room declares the forms of its own kinds of artefact, in a module `forms`. A form names the fields that code reads.
Other fields pass, so a newer version may add some. A field with the default UNSET may be missing, but not null.

An annotation is a JSON type, Any, a Literal, list[X], tuple[X, ...], tuple[X, Y], dict[str, X], a form or a dataclass.
It may be a union, and may be Annotated with a Meta. A whole number is a float too, a bool is no number. This needs the
standard library only: a checker in C that was tried crashed the process.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from merino_edge import limits
from merino_edge.errors import ArtefactError

AGAIN = "it was altered; make it again"
Check = Callable[[Any], Any]  # the value as the form has it; raises Wrong


class UnsetType:
    """The type of UNSET: a field that is missing."""


UNSET = UnsetType()


@dataclasses.dataclass(frozen=True)
class Meta:
    """Bounds of a number; lengths of a text, array or object; a pattern of a text, and what to call it."""

    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    min_length: int = 0
    max_length: int | None = None
    pattern: str = ""
    called: str = ""


class Form:
    """An object. Its annotations say what each field must be, and its class attributes are defaults.

    `rename` gives the name in the document of a field that cannot have it here. `__post_init__` may raise ValueError.
    """

    _names: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, rename: Mapping[str, str] | None = None) -> None:
        cls._names = rename or {}

    def __post_init__(self) -> None:
        """Check what concerns several fields. Raises ValueError."""


# One line of text, which can be printed; a few sentences; any text; a hash.
Line = Annotated[str, Meta(max_length=1_000, pattern=r"[^\x00-\x1f\x7f-\x9f]*", called="a line of text")]
Paragraph = Annotated[str, Meta(max_length=10_000)]
Text = Annotated[str, Meta(max_length=limits.MAX_PROMPT_BYTES)]
Sha256 = Annotated[str, Meta(pattern=r"[0-9a-f]{64}", called="a hash")]
# A number of things; a measured or computed number, far from where floats overflow; one that may be divided by.
Count = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Positive = Annotated[float, Meta(ge=1e-12, le=1e12)]
Positions = Annotated[int, Meta(ge=1, le=limits.MAX_POSITIONS)]
Vocabulary = Annotated[int, Meta(ge=1, le=limits.MAX_VOCAB_SIZE)]

FormType = TypeVar("FormType")


def read(document: Any, form: type[FormType], where: str, hint: str = AGAIN) -> FormType:
    """The fields of `document` that `form` names. Raises ArtefactError naming `where` and the field."""
    try:
        return _checked(document, form)  # type: ignore[no-any-return]
    except Wrong as wrong:
        raise ArtefactError(f"{where}: {wrong}", hint) from None


def check(document: Any, form: type[Any], where: str, hint: str = AGAIN) -> None:
    """Raise ArtefactError unless `document` has this form, or is what this dataclass is made of."""
    read(document, form, where, hint)


def problem(document: Any, form: type[Any]) -> str:
    """How `document` differs from `form`, in words; "" where it does not."""
    try:
        _checked(document, form)
    except Wrong as wrong:
        return str(wrong)
    return ""


def _checked(document: Any, form: Any) -> Any:
    return _check_of(form)(document)


class Wrong(Exception):
    """A value that its form does not allow: points[0].score: expected float, got str"""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.place: list[str] = []  # from the innermost outwards

    def __str__(self) -> str:
        place = "".join(reversed(self.place)).removeprefix(".")
        return f"{place[:200]}: {self.what}" if place else self.what


NAMES = {str: "str", int: "int", float: "float", bool: "bool", type(None): "null", list: "array", dict: "object"}


def _name(value: Any) -> str:
    return NAMES.get(type(value), type(value).__name__)


@functools.cache
def _check_of(kind: Any) -> Check:
    """The check of an annotation. What it accepts is decided by the JSON types that `_accepted` tells."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin is Annotated:
        return _bounded(_check_of(arguments[0]), _accepted(arguments[0]), arguments[1])
    if origin in (Union, types.UnionType):
        return _one_of([option for option in arguments if option is not UnsetType])
    inner: Check
    if origin is Literal:
        inner = functools.partial(_literal, arguments)
    elif origin is dict:
        inner = functools.partial(_object, _check_of(arguments[0]), _check_of(arguments[1]))
    elif origin is list or (origin is tuple and arguments[-1] is ...):
        inner = functools.partial(_array, origin, _check_of(arguments[0]))
    elif origin is tuple:
        inner = functools.partial(_row, [_check_of(argument) for argument in arguments])
    elif dataclasses.is_dataclass(kind) or issubclass(kind, Form):
        inner = _fields(kind)
    else:
        inner = float if kind is float else lambda value: value
    accepted, expected = _accepted(kind), _in_words(kind)

    def checked(value: Any) -> Any:
        if type(value) not in accepted:
            raise Wrong(f"expected {expected}, got {_name(value)}")
        return inner(value)

    return checked


def _accepted(kind: Any) -> tuple[type, ...]:
    """The JSON types of an annotation's values, as Python has them."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _accepted(arguments[0])
    if origin in (Union, types.UnionType):
        return tuple(accepted for option in arguments for accepted in _accepted(option))
    if origin is Literal:
        return tuple({type(value) for value in arguments})
    if kind is Any:
        return tuple(NAMES)
    if kind is float:
        return (float, int)
    if kind in (str, int, bool, type(None)):
        return (kind,)
    return (list,) if origin in (list, tuple) else (dict,)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _in_words(get_args(kind)[0])
    return "float" if kind is float else " or ".join(dict.fromkeys(NAMES[accepted] for accepted in _accepted(kind)))


def _bounded(inner: Check, accepted: tuple[type, ...], meta: Meta) -> Check:
    pattern = re.compile(meta.pattern) if meta.pattern else None
    is_number = int in accepted
    name = "float" if float in accepted else NAMES[accepted[0]]

    def checked(value: Any) -> Any:
        if type(value) in accepted:
            if is_number:
                if meta.ge is not None and value < meta.ge:
                    raise Wrong(f"expected {name} >= {meta.ge:g}")
                if meta.gt is not None and value <= meta.gt:
                    raise Wrong(f"expected {name} > {meta.gt:g}")
                if meta.le is not None and value > meta.le:
                    raise Wrong(f"expected {name} <= {meta.le:g}")
            else:
                if len(value) < meta.min_length:
                    raise Wrong(f"expected {name} of length >= {meta.min_length}")
                if meta.max_length is not None and len(value) > meta.max_length:
                    raise Wrong(f"expected {name} of length <= {meta.max_length}")
                if pattern is not None and pattern.fullmatch(value) is None:
                    raise Wrong(f"expected {meta.called}")
        return inner(value)

    return checked


def _one_of(options: list[Any]) -> Check:
    by_type: dict[type, Check] = {}
    for option in options:
        for accepted in _accepted(option):
            by_type.setdefault(accepted, _check_of(option))
    expected = " or ".join(dict.fromkeys(map(_in_words, options)))

    def checked(value: Any) -> Any:
        if (inner := by_type.get(type(value))) is None:
            raise Wrong(f"expected {expected}, got {_name(value)}")
        return inner(value)

    return checked


def _literal(choices: tuple[Any, ...], value: Any) -> Any:
    if value not in choices:
        raise Wrong(f"{str(value)[:100]!r} is not one of {', '.join(map(str, choices))}")
    return value


def _array(kind: type, item: Check, value: list[Any]) -> Any:
    found = []
    for index, inside in enumerate(value):
        try:
            found.append(item(inside))
        except Wrong as wrong:
            wrong.place.append(f"[{index}]")
            raise
    return kind(found)


def _row(items: list[Check], value: list[Any]) -> tuple[Any, ...]:
    if len(value) != len(items):
        raise Wrong(f"expected array of length {len(items)}, got {len(value)}")
    found = []
    for index, (item, inside) in enumerate(zip(items, value, strict=True)):
        try:
            found.append(item(inside))
        except Wrong as wrong:
            wrong.place.append(f"[{index}]")
            raise
    return tuple(found)


def _object(key: Check, item: Check, value: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, inside in value.items():
        try:
            found[key(name)] = item(inside)
        except Wrong as wrong:
            wrong.place.append(f".{name[:100]}")
            raise
    return found


def _fields(kind: Any) -> Check:
    """The check of a form or a dataclass."""
    hints = {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name != "_names"}
    is_form = isinstance(kind, type) and issubclass(kind, Form)
    names = kind._names if is_form else {}
    if is_form:
        required = {name for name in hints if not hasattr(kind, name)}
    else:
        required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    checks = [(name, names.get(name, name), _check_of(hint)) for name, hint in hints.items()]

    def checked(value: dict[str, Any]) -> Any:
        found = {}
        for name, key, item in checks:
            if key in value:
                try:
                    found[name] = item(value[key])
                except Wrong as wrong:
                    wrong.place.append(f".{key}")
                    raise
            elif name in required:
                raise Wrong(f"object missing required field {key}")
        try:
            if not is_form:
                return kind(**found)
            form = object.__new__(kind)
            form.__dict__.update(found)
            form.__post_init__()
        except ValueError as error:
            raise Wrong(str(error)) from None
        return form

    return checked
