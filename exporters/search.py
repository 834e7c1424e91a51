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
NEAR, SHRINK = (
    1.05,
    0.9,
)  # the error aimed at after a plan failed: half the way (in decibels) to the last that held, then less


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
    if met(tried(plans[0]), budget) or met(tried(plans[-1]), budget):
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
    """Spend what is left of the budget: the cheapest plan by the prediction, then pictures; the last that held.

    The error aimed at follows from what the last plan left of the budget; where a plan fails it is lowered.
    """
    held, factor = start, min(slack(start, budget), MOST_SLACK)
    for _ in range(attempts):
        plan = cheapest(groups, error_of(groups, held.plan) * factor)
        if plan is None or cost_of(groups, plan) >= cost_of(groups, held.plan):
            break
        point = tried(plan)
        if met(point, budget):
            held, factor = point, min(slack(point, budget), MOST_SLACK)
        else:
            factor = factor**0.5 if factor > NEAR else factor * SHRINK
    return held


def cheapest(groups: Sequence[Group], limit: float) -> Plan | None:
    """A cheap plan whose predicted error is at most `limit`; ``None`` where there is none.

    Every plan of the chain up to the first that fits is completed by the one step that makes it fit at least cost, then
    taken down where that still fits; the cheapest result. The chain alone may stop far below the limit.
    """
    found: list[Plan] = []
    for plan in chain(groups):
        fits = error_of(groups, plan) <= limit
        whole = plan if fits else step_up(groups, plan, limit)
        if whole is not None:
            found.append(steps_down(groups, whole, limit))
        if fits:
            break
    return min(found, key=lambda plan: cost_of(groups, plan), default=None)


def step_up(groups: Sequence[Group], plan: Plan, limit: float) -> Plan | None:
    """The plan with the one group raised that makes it fit at least cost, if one does."""
    total = error_of(groups, plan)
    options = [
        (other.cost - group.levels[now].cost, number, level)
        for number, (group, now) in enumerate(zip(groups, plan, strict=True))
        for level, other in enumerate(group.levels)
        if total - group.levels[now].error + other.error <= limit
    ]
    if not options:
        return None
    _, number, level = min(options)
    return (*plan[:number], level, *plan[number + 1 :])


def steps_down(groups: Sequence[Group], plan: Plan, limit: float) -> Plan:
    """The plan with groups lowered, most cost saved per error first, while the predicted error stays below `limit`."""
    options = []
    for number, (group, now) in enumerate(zip(groups, plan, strict=True)):
        for level, other in enumerate(group.levels):
            saved, added = group.levels[now].cost - other.cost, other.error - group.levels[now].error
            if saved > 0:
                options.append((max(added, 0.0) / saved, number, level, added))
    total, lowered = error_of(groups, plan), dict[int, int]()
    for _, number, level, added in sorted(options):
        if number not in lowered and total + added <= limit:
            lowered[number] = level
            total += added
    return tuple(lowered.get(number, level) for number, level in enumerate(plan))
