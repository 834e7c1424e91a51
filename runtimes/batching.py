"""Continuous batching: requests of one pipeline share calls of the denoiser, and join and leave between steps.

The method is that of Orca (Yu et al., OSDI 2022), with a step of diffusion in the place of a token: at every round each
request has its next `Evaluation`, whatever its step, and those of one shape are rows of one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.embedding_cache import CachedComponents, EmbeddingCache
from intaglio.runtimes.evaluation import Evaluation, Work, batches, run_joined
from intaglio.runtimes.sampling import Request, Result, StepEvent

if TYPE_CHECKING:
    from intaglio.runtimes.pipeline import Pipeline

Each = Callable[[StepEvent], Any]
Place = tuple[int, int]  # a request's number, and one of its branches
Answer = dict[int, np.ndarray] | Exception


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: with a result, or an error of its own."""

    ident: str
    result: Result | None
    error: Exception | None


@dataclass(slots=True)
class Job:
    """A request under way; `wanted` is what its denoiser is to answer next, `None` before it began."""

    ident: str
    request: Request
    each: Each
    work: Work
    wanted: Evaluation | None = None
    stopping: bool = False


class Batcher:
    """The requests of one pipeline that are under way.

    Args:
        pipeline: with every component loaded.
        rows: of one call at most; the artifact's own limit where not given.
        cache: of prompt embeddings.
        between: called after every part of a round, of which each may take long.

    Raises:
        UsageError: more rows than the artifact allows.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        rows: int | None = None,
        cache: EmbeddingCache | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        limit = pipeline.artifact.manifest.shapes["batch"].max
        if rows is not None and not 1 <= rows <= limit:
            raise UsageError(f"{rows} rows are not allowed: 1 to {limit}, the artifact's largest batch")
        self.between = between
        self.sampler, self.rows = pipeline.sampler, limit if rows is None else rows
        self.cache = EmbeddingCache() if cache is None else cache
        self.engines = CachedComponents(pipeline.engines, pipeline.sampler, self.cache)
        self.jobs: dict[str, Job] = {}
        self.calls = self.rows_run = self.rounds = 0  # of the denoiser so far; rounds that had one
        self.current: str | None = None  # whose own code runs: its warnings are its own

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, ident: str, request: Request, each: Each = lambda event: None) -> None:
        """Begin a request at the next round; `each` is told of its steps.

        Raises:
            UsageError: `ident` is taken.
        """
        if ident in self.jobs:
            raise UsageError(f"request {ident!r} is under way already")
        self.jobs[ident] = Job(ident, request, each, self.sampler.work(self.engines, request))

    def cancel(self, ident: str) -> bool:
        """Drop a request, its place is free at once; whether there was one."""
        job = self.jobs.pop(ident, None)
        if job is not None:
            job.work.close()
        return job is not None

    def finish(self, ident: str) -> bool:
        """End a request's denoising after its next step, with the picture as it is then; whether there is one."""
        if ident in self.jobs:
            self.jobs[ident].stopping = True
        return ident in self.jobs

    def advance(self) -> list[Outcome]:
        """One round: every request one step further; those that ended, in the order they came."""
        outcomes = [self._go(job, None) for job in list(self.jobs.values()) if job.wanted is None]
        jobs = list(self.jobs.values())
        self.rounds += bool(jobs)
        answers = self._evaluate(jobs) if jobs else []
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Exception):
                outcomes.append(self._end(job, None, answer))
            elif job.ident in self.jobs:  # `each` of another may have cancelled it
                outcomes.append(self._go(job, answer))
        return [outcome for outcome in outcomes if outcome is not None]

    def _evaluate(self, jobs: Sequence[Job]) -> list[list[np.ndarray] | Exception]:
        """The denoiser's answers to every job: an array a branch, or what went wrong for this one."""
        wanted = [job.wanted for job in jobs if job.wanted is not None]
        answers: list[Answer] = [{} for _ in wanted]
        for places in batches(wanted, self.sampler.manifest.components[self.sampler.denoiser], self.rows):
            self._run(places, wanted, answers)
            self.between()
        return [a if isinstance(a, Exception) else [a[branch] for branch in sorted(a)] for a in answers]

    def _run(self, places: Sequence[Place], wanted: Sequence[Evaluation], answers: list[Answer]) -> None:
        """One call for all of these places; where it fails, one a request, so that only those fail that do alone."""
        name = self.sampler.denoiser
        sets = [wanted[number].feeds[branch] for number, branch in places]
        try:
            outputs = run_joined(self.engines[name], self.sampler.manifest.components[name], sets)
        except Exception as error:
            numbers = sorted({number for number, _ in places})
            if len(numbers) == 1:
                answers[numbers[0]] = error
                return
            for number in numbers:
                self._run([place for place in places if place[0] == number], wanted, answers)
                self.between()
            return
        self.calls, self.rows_run = self.calls + 1, self.rows_run + sum(len(output) for output in outputs)
        for (number, branch), output in zip(places, outputs, strict=True):
            answer = answers[number]
            if not isinstance(answer, Exception):
                answer[branch] = output

    def _go(self, job: Job, answer: list[np.ndarray] | None) -> Outcome | None:
        """Take a job to its next evaluation, telling of the step between; an outcome where it ended."""
        self.current = job.ident
        try:
            event = job.work.send(answer)
            while isinstance(event, StepEvent):
                job.each(event)
                if job.ident not in self.jobs:
                    return None
                event = job.work.send(job.stopping)
        except StopIteration as end:
            return self._end(job, end.value, None)
        except Exception as error:
            return self._end(job, None, error)
        finally:
            self.current = None
            self.between()
        job.wanted = dataclasses.replace(event, feeds=tuple(self.sampler.widened(feeds) for feeds in event.feeds))
        return None

    def _end(self, job: Job, result: Result | None, error: Exception | None) -> Outcome:
        self.jobs.pop(job.ident, None)
        job.work.close()
        return Outcome(job.ident, result, error)
