"""Dominance: programs and block choices that cannot hold the optimum, so the solver need not look at them.

A program is left out if it is too expensive before its blocks are chosen. It is also left out if another program scores
its blocks alike and costs no more in every part. For example, a larger vocabulary costs something in most metrics and
adds nothing to the score. So the smallest one dominates, unless a budget counts text instead of tokens. Within one
program, a block choice is left out if another of its width and layers replaces it at no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merino_edge.search.problem import Floats, Problem, TemplateProgram


@dataclass(frozen=True)
class ProgramGroup:
    """A program, and the numbers of the programs that it stands for: its own, and of those that it dominates."""

    program: TemplateProgram
    numbers: list[int]


def program_groups(problem: Problem) -> tuple[list[ProgramGroup], list[int]]:
    """The programs of the problem's templates, each in the group of one that no other dominates.

    Programs are numbered in the order of their templates. The second list has those that cannot fit the budgets.
    """
    programs = [program for template in problem.templates for program in problem.programs(template)]
    too_dear = [number for number, program in enumerate(programs) if not _can_fit(problem, program)]
    groups: list[ProgramGroup] = []
    for number in sorted(set(range(len(programs))) - set(too_dear), key=lambda i: _order(problem, programs[i])):
        program = programs[number]
        dominating = next((group for group in groups if _dominates(problem, group.program, program)), None)
        if dominating is None:
            groups.append(ProgramGroup(program, [number]))
        else:
            dominating.numbers.append(number)
    return groups, too_dear


def _can_fit(problem: Problem, program: TemplateProgram) -> bool:
    """Whether the program's cheapest parts, with as few blocks as are allowed, keep every budget."""
    first_choice, w = problem.space.first_choice, program.widths
    choices = program.block_costs[first_choice[w.start] : first_choice[w.stop]]
    floor = program.start[w].min(0) + program.finish[w].min(0) + problem.space.blocks[0] * choices.min(0)
    return bool((floor <= program.limits).all())


def _order(problem: Problem, program: TemplateProgram) -> tuple[float, int, int, int]:
    """The order of comparison: cheap programs first, then long contexts, then few parameters.

    In this order a program comes after every program that can dominate it.
    """
    template = problem.space.templates[program.template]
    minimum = (program.start[program.widths] / program.limits).sum(1).min()
    return float(minimum), -template.context, template.vocabulary.size * template.embedding_width, program.template


def _dominates(problem: Problem, a: TemplateProgram, b: TemplateProgram) -> bool:
    """Whether every path of `b` is also a path of `a` that scores as much and costs no more.

    Only programs with the same units and the same sums of each metric compare.
    """
    space, score = problem.space, problem.score
    first, second = space.templates[a.template], space.templates[b.template]
    if not score.sees_ffn_only or first.ffn != second.ffn or a.metrics != b.metrics or (a.scales != b.scales).any():
        return False
    if score.uses_cut and first.embedding_width < second.embedding_width:
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


def replaced_choices(scores: Floats, costs: Floats, ties: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A [depths, N] mask of the choices of one cell that another choice replaces.

    `scores` is [depths, N] and `costs` is [N, K]. Among equal choices the one with the least of `ties` [N] stays, and
    then the first.
    """
    no_dearer = (costs[:, None] <= costs[None]).all(-1)  # [i, j]: i costs no more than j
    rank = np.lexsort((np.arange(len(costs)), ties)).argsort()
    preferred = (costs[:, None] < costs[None]).any(-1) | (rank[:, None] < rank[None])
    better = scores[:, :, None] > scores[:, None]  # [depth, i, j]
    equal = scores[:, :, None] == scores[:, None]
    return np.asarray((no_dearer & (better | (equal & preferred))).any(1))
