"""Tools that a client offers, and which of them an answer may or must call.

Source: https://platform.openai.com/docs/api-reference/chat, the fields `tools` and `tool_choice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from merino_edge import limits
from merino_edge.runtime.call_format import Function
from merino_edge.runtime.server.strict import FieldError, Strict

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class OfferedFunction(Strict):
    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # ignored: a call always follows its schema


class Tool(Strict):
    type: Literal["function"]
    function: OfferedFunction

    def document(self) -> dict[str, Any]:
        """The tool as a chat template describes it."""
        function = {"name": self.function.name, "description": self.function.description}
        return {"type": "function", "function": {**function, "parameters": self.function.parameters or NO_ARGUMENTS}}


class ChosenFunction(Strict):
    name: str


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenFunction


Tools = Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS)]
ToolChoice = Literal["auto", "none", "required"] | ChosenTool


@dataclass(frozen=True)
class ToolUse:
    """What an answer may do with tools: `described` are in the prompt, and `callable` may be called."""

    described: list[dict[str, Any]]
    callable: list[Function]
    forced: bool  # the answer is a call
    parallel: bool  # or several


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, *, parallel: bool) -> ToolUse | None:
    """What `tools` and `tool_choice` ask for; None where nothing may be called. Raises FieldError."""
    if not tools:
        if choice not in (None, "auto", "none"):
            raise FieldError("tool_choice", "there are no tools to choose from")
        return None
    names = [tool.function.name for tool in tools]
    for i, tool in enumerate(tools):
        if tool.function.name in names[:i]:
            raise FieldError(f"tools.{i}.function.name", f"a second tool is called {tool.function.name!r}")
        if (tool.function.parameters or NO_ARGUMENTS).get("type", "object") != "object":
            raise FieldError(f"tools.{i}.function.parameters", "the schema describes no object")
    if choice == "none":
        return None
    wanted = names
    if isinstance(choice, ChosenTool):
        wanted = [choice.function.name]
        if wanted[0] not in names:
            raise FieldError("tool_choice", f"there is no tool {wanted[0][:64]!r}")
    functions = [
        Function(tool.function.name, tool.function.parameters or NO_ARGUMENTS)
        for tool in tools
        if tool.function.name in wanted
    ]
    several = parallel and not isinstance(choice, ChosenTool)
    return ToolUse([tool.document() for tool in tools], functions, choice not in (None, "auto"), several)
