"""Options whose values are names in one kind of letters, so that a person may type them in any."""

from __future__ import annotations

from typing import Any

# By the name of the verb's parameter. A path, a text or a name of the user's own is none of these.
LOWER_CASE = frozenset({
    "against", "also", "backend", "bits", "cache", "direction", "family", "lowering", "optimizer", "parallel",
    "precision", "rounding", "runtime", "solver", "target", "tasks",
})  # fmt: skip
UPPER_CASE = frozenset({"capability"})
PATHS = {"evaluate": {"against"}, "bench": {"against"}, "show": {"against"}}  # of the same name in other verbs


def spell(verb: str, parameters: dict[str, Any]) -> None:
    """Rewrite the choices among a verb's parameters as the program spells them."""
    for name, value in parameters.items():
        if isinstance(value, str) and name not in PATHS.get(verb, ()):
            if name in LOWER_CASE:
                parameters[name] = value.lower()
            elif name in UPPER_CASE:
                parameters[name] = value.upper()
