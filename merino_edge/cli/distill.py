"""`merino-edge distill`: the group of the two verbs that run a teacher."""

from __future__ import annotations

from typing import Any

import typer

from merino_edge.cli.distill_generate import distill_generate
from merino_edge.cli.distill_logits import distill_logits
from merino_edge.cli.verbs import RENAMED, VERBS, HelpfulGroup, add_verb
from merino_edge.errors import InputError


class DistillGroup(HelpfulGroup):
    """The two verbs. Their old names are those that they had as verbs of the program."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """As in click. Raises InputError where a verb's old name is used."""
        if cmd_name in RENAMED and not ctx.resilient_parsing:  # completion parses resiliently
            raise InputError(f"the verb distill {cmd_name} has a new name", f"run: merino-edge {RENAMED[cmd_name]}")
        return super().get_command(ctx, cmd_name)


group = typer.Typer(
    name="distill",
    help=VERBS["distill"].summary,
    cls=DistillGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
add_verb(group, "generate", distill_generate)
add_verb(group, "logits", distill_logits)
