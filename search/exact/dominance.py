"""Which frames' programs may hold the optimum: none that is too dear before its blocks are chosen, and of two whose
blocks score alike, not the one that costs as much in every part.

A larger vocabulary, say, costs something in most metrics and scores nothing, so the smallest undercuts it, unless a
budget counts text instead of tokens.
"""

from __future__ import annotations

from merino_edge.search.problem import Problem, TemplateProgram


def useful_programs(problem: Problem) -> list[TemplateProgram]:
    """The programs of the problem's frames that fit its budgets at all and that no other undercuts."""
    kept: list[TemplateProgram] = []
    programs = [program for template in problem.templates for program in problem.programs(template)]
    possible = [program for program in programs if _affordable(problem, program)]
    for mine in sorted(possible, key=lambda program: _order(problem, program)):
        if not any(_undercuts(problem, other, mine) for other in kept):
            kept.append(mine)
    return kept


def _affordable(problem: Problem, program: TemplateProgram) -> bool:
    """Whether the cheapest ends with as many of the cheapest genes as there are blocks at least keep every budget."""
    first_choice, w = problem.space.first_choice, program.widths
    choices = program.block_costs[first_choice[w.start] : first_choice[w.stop]]
    floor = program.start[w].min(0) + program.finish[w].min(0) + problem.space.blocks[0] * choices.min(0)
    return bool((floor <= program.limits).all())


def _order(problem: Problem, program: TemplateProgram) -> tuple[float, int, int, int]:
    """Cheap ones first, then long contexts, then few parameters: what undercuts comes before what is undercut."""
    shape = problem.space.templates[program.template]
    least = (program.start[program.widths] / program.limits).sum(1).min()
    return float(least), -shape.context, shape.vocabulary.size * shape.embedding_width, program.template


def _undercuts(problem: Problem, a: TemplateProgram, b: TemplateProgram) -> bool:
    """Whether every chain of `b` is one of `a` that scores as much and costs no more. Only units alike compare, and as
    many sums of each metric."""
    space, score = problem.space, problem.score
    mine, other = space.templates[a.template], space.templates[b.template]
    if not score.sees_ffn_only or mine.ffn != other.ffn or a.metrics != b.metrics or (a.scales != b.scales).any():
        return False
    if score.uses_cut and mine.embedding_width < other.embedding_width:
        return False
    if b.widths.start < a.widths.start or b.widths.stop > a.widths.stop or a.end_activation > b.end_activation:
        return False
    w, choices = b.widths, slice(space.first_choice[b.widths.start], space.first_choice[b.widths.stop])
    pairs = ((a.start[w], b.start[w]), (a.finish[w], b.finish[w]), (a.changes[w][:, w], b.changes[w][:, w]))
    if not all((x <= y).all() for x, y in pairs):
        return False
    if a.block_costs is b.block_costs:
        return True
    return bool(
        (a.block_costs[choices] <= b.block_costs[choices]).all()
        and (a.activations[choices] <= b.activations[choices]).all()
    )
