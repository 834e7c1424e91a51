"""Which format each group of layers takes: the cheapest plan whose picture was seen to stay within a budget.

The predicted error of a plan is the sum of its groups' squared errors, each measured alone. Of all plans those on the
lower convex hull form a chain from the cheapest to the most accurate, each a step of the best ratio of error removed to
cost paid (the greedy solution of a multiple-choice knapsack: Sinha and Zoltners, Operations Research 27(3), 1979).
Pictures decide: a bisection over the chain finds a plan that holds beside one that does not, and what is left of the
budget is spent on steps down from there. Nothing here knows a graph or an engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from intaglio.exporters.budget import Plan, Point, met, slack, unmet
from intaglio.profiles.errors import UsageError

OBJECTIVES = ("size", "speed")
ATTEMPTS = 8  # verifications after the bisection
MOST_SLACK = 4.0  # times the predicted error that a step down may aim at; the prediction is no better than that


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One way to store a group.

    Attributes:
        request: the format asked for.
        formats: what every member gets: its operator, its shape and the family's rules have their say.
        bytes: of codes and scales.
        cost: what the objective counts: `bytes`, or predicted time.
        error: squared relative L2 error of the component's output with this group alone quantized.
    """

    request: str
    formats: tuple[str, ...]
    bytes: int
    cost: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that are decided together, because they share an input; `members` are parameter names."""

    members: tuple[str, ...]
    levels: tuple[Level, ...]

    @property
    def name(self) -> str:
        """For people: the first member, and how many more."""
        more = len(self.members) - 1
        return f"{self.members[0]} (+{more})" if more else self.members[0]


class Unmet(UsageError):
    """No plan that was tried stays within the budget."""


@dataclass(slots=True)
class Found:
    """The result: every point that was verified, in order, and the one to take."""

    chosen: Point
    points: list[Point] = field(default_factory=list)


def error_of(groups: Sequence[Group], plan: Plan) -> float:
    """Predicted squared error: independent errors add up."""
    return math.fsum(group.levels[i].error for group, i in zip(groups, plan, strict=True))


def cost_of(groups: Sequence[Group], plan: Plan) -> float:
    """What the objective counts."""
    return math.fsum(group.levels[i].cost for group, i in zip(groups, plan, strict=True))


def formats_of(groups: Sequence[Group], plan: Plan) -> dict[str, str]:
    """Parameter to format."""
    pairs = (zip(g.members, g.levels[i].formats, strict=True) for g, i in zip(groups, plan, strict=True))
    return {parameter: name for rows in pairs for parameter, name in rows}


def hull(levels: Sequence[Level]) -> list[int]:
    """The levels that some price of error makes the best ones, the cheapest first; equal ones once."""
    kept: list[int] = []
    for i in sorted(range(len(levels)), key=lambda i: (levels[i].cost, levels[i].error, i)):
        if kept and levels[i].error >= levels[kept[-1]].error:
            continue
        while len(kept) > 1 and slope(levels[kept[-2]], levels[kept[-1]]) <= slope(levels[kept[-1]], levels[i]):
            kept.pop()
        kept.append(i)
    return kept


def slope(cheap: Level, dear: Level) -> float:
    """Error removed per cost paid."""
    paid = dear.cost - cheap.cost
    return (cheap.error - dear.error) / paid if paid > 0 else math.inf


def chain(groups: Sequence[Group]) -> list[Plan]:
    """Plans from the cheapest to the most accurate; each differs from the one before in one group."""
    hulls = [hull(group.levels) for group in groups]
    moves = [
        (-slope(group.levels[a], group.levels[b]), number, place, b)
        for number, (group, kept) in enumerate(zip(groups, hulls, strict=True))
        for place, (a, b) in enumerate(itertools.pairwise(kept))
    ]
    plan = [kept[0] for kept in hulls]
    plans = [tuple(plan)]
    for _, number, _, level in sorted(moves):
        plan[number] = level
        plans.append(tuple(plan))
    return plans


def bisect(last: int, holds: Callable[[int], bool]) -> int:
    """An index up to `last` that holds while the one before it does not (or is none); `last` is known to hold."""
    if last == 0 or holds(0):
        return 0
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def search(
    groups: Sequence[Group],
    verify: Callable[[Plan], Point],
    budget: Mapping[str, float],
    *,
    objective: str = "size",
    usable: Callable[[Plan], bool] = lambda plan: True,
    attempts: int = ATTEMPTS,
    before: Sequence[Point] = (),
) -> Found:
    """Find the cheapest plan within the budget.

    Args:
        groups: with their measured errors.
        verify: makes the pictures of a plan.
        budget: key to limit, see `BUDGETS`.
        objective: ``size`` or ``speed``; of the points that hold, the smallest or fastest is chosen.
        usable: whether a plan may be built at all (enough of it is quantized); of a chain, the first ones are.
        attempts: verifications to spend after the bisection.
        before: points that were verified already and may win, such as the uniform ones.

    Raises:
        Unmet: no plan that was verified holds; with the best one.
    """
    points: list[Point] = list(before)

    def tried(plan: Plan) -> Point:
        known = next((p for p in points if p.plan == plan), None)
        if known is None:
            known = verify(plan)
            points.append(known)
        return known

    plans = chain(groups)
    while len(plans) > 1 and not usable(plans[-1]):
        plans.pop()
    if met(tried(plans[-1]), budget):
        border = bisect(len(plans) - 1, lambda k: met(tried(plans[k]), budget))
        improve(groups, tried(plans[border]), tried, budget, attempts)
    holding = [p for p in points if met(p, budget) and usable(p.plan)]
    if not holding:
        raise Unmet(unmet(budget, points))
    return Found(chosen=min(holding, key=rank(groups, objective)), points=points)


def rank(groups: Sequence[Group], objective: str) -> Callable[[Point], tuple[float, ...]]:
    """The order of points that hold: by what was measured, then by the prediction."""

    def key(point: Point) -> tuple[float, ...]:
        first = point.bytes if objective == "size" else -(point.speed or 0.0)
        return (first, cost_of(groups, point.plan), -point.psnr)

    return key


def improve(
    groups: Sequence[Group],
    start: Point,
    tried: Callable[[Plan], Point],
    budget: Mapping[str, float],
    attempts: int,
) -> Point:
    """Spend what is left of the budget on steps down, most cost saved per error first; returns the last that held.

    A batch of steps that fails is halved; one step that fails is not tried again.
    """
    held, size, barred = start, len(groups), set[tuple[int, int]]()
    for _ in range(attempts):
        limit = error_of(groups, held.plan) * min(slack(held, budget), MOST_SLACK)
        batch = steps_down(groups, held.plan, limit, barred)
        batch = batch[: max(size, 1)]
        if not batch:
            break
        changed = dict(batch)
        point = tried(tuple(changed.get(number, level) for number, level in enumerate(held.plan)))
        if met(point, budget):
            held, size = point, len(groups)
        elif len(batch) == 1:
            barred.add(batch[0])
        else:
            size = len(batch) // 2
    return held


def steps_down(
    groups: Sequence[Group], plan: Plan, limit: float, barred: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """(group, cheaper level), best ratio first, at most one a group, while the predicted error stays below `limit`.

    Where not one fits, the best alone: predictions err, pictures decide.
    """
    options = []
    for number, (group, now) in enumerate(zip(groups, plan, strict=True)):
        for level, other in enumerate(group.levels):
            saved, added = group.levels[now].cost - other.cost, other.error - group.levels[now].error
            if saved > 0 and (number, level) not in barred:
                options.append((max(added, 0.0) / saved, number, level, added))
    total, chosen = error_of(groups, plan), dict[int, int]()
    for _, number, level, added in sorted(options):
        if number not in chosen and total + added <= limit:
            chosen[number] = level
            total += added
    if not chosen and options:
        _, number, level, _ = min(options)
        chosen[number] = level
    return list(chosen.items())
