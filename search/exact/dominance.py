"""Which frames' programs may hold the optimum: none that is too dear before its blocks are chosen, and of two whose
blocks score alike, not the one that costs as much in every part.

A larger vocabulary, say, costs something in most metrics and scores nothing, so the smallest undercuts it, unless a
budget counts text instead of tokens.
"""

from __future__ import annotations

from merino_edge.search.problem import FrameProgram, Problem


def useful_programs(problem: Problem) -> list[FrameProgram]:
    """The programs of the problem's frames that fit its budgets at all and that no other undercuts."""
    kept: list[FrameProgram] = []
    programs = [program for frame in problem.frames for program in problem.programs(frame)]
    possible = [program for program in programs if _affordable(problem, program)]
    for mine in sorted(possible, key=lambda program: _order(problem, program)):
        if not any(_undercuts(problem, other, mine) for other in kept):
            kept.append(mine)
    return kept


def _affordable(problem: Problem, program: FrameProgram) -> bool:
    """Whether the cheapest ends with as many of the cheapest genes as there are blocks at least keep every budget."""
    first_gene, w = problem.space.first_gene, program.widths
    genes = program.genes[first_gene[w.start] : first_gene[w.stop]]
    floor = program.start[w].min(0) + program.finish[w].min(0) + problem.space.blocks[0] * genes.min(0)
    return bool((floor <= program.limits).all())


def _order(problem: Problem, program: FrameProgram) -> tuple[float, int, int, int]:
    """Cheap ones first, then long contexts, then few parameters: what undercuts comes before what is undercut."""
    shape = problem.space.frames[program.frame]
    least = (program.start[program.widths] / program.limits).sum(1).min()
    return float(least), -shape.context, shape.vocabulary.size * shape.embedding_width, program.frame


def _undercuts(problem: Problem, a: FrameProgram, b: FrameProgram) -> bool:
    """Whether every chain of `b` is one of `a` that scores as much and costs no more. Only units alike compare, and as
    many sums of each metric."""
    space, score = problem.space, problem.score
    mine, other = space.frames[a.frame], space.frames[b.frame]
    if not score.frame_free or mine.ffn != other.ffn or a.metrics != b.metrics or (a.scales != b.scales).any():
        return False
    if score.uses_cut and mine.embedding_width < other.embedding_width:
        return False
    if b.widths.start < a.widths.start or b.widths.stop > a.widths.stop or a.end_activation > b.end_activation:
        return False
    w, genes = b.widths, slice(space.first_gene[b.widths.start], space.first_gene[b.widths.stop])
    pairs = ((a.start[w], b.start[w]), (a.finish[w], b.finish[w]), (a.changes[w][:, w], b.changes[w][:, w]))
    if not all((x <= y).all() for x, y in pairs):
        return False
    if a.genes is b.genes:
        return True
    return bool((a.genes[genes] <= b.genes[genes]).all() and (a.activations[genes] <= b.activations[genes]).all())
