"""`merino-edge distill`: the group of the two verbs that run a teacher."""

from __future__ import annotations

import typer

from merino_edge.cli.distill_generate import distill_generate
from merino_edge.cli.distill_logits import distill_logits
from merino_edge.cli.verbs import VERBS, HelpfulGroup, add_verb

group = typer.Typer(
    name="distill",
    help=VERBS["distill"].summary,
    cls=HelpfulGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
add_verb(group, "generate", distill_generate)
add_verb(group, "logits", distill_logits)
