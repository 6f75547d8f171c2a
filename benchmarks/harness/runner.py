"""Runs tasks, here or in processes of their own; this process alone writes."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.harness.journal import Journal
from benchmarks.harness.task import Experiment, Score, Settings, Task


class Job(NamedTuple):
    """A task in a list that every process makes for itself, and what is to do of it."""

    experiment: str
    index: int
    methods: list[str]


@dataclass
class Run:
    """Journals, progress and failures of one run.

    Attributes:
        settings: Of the run.
        tasks: By experiment.
        journals: By experiment.
        bar: Counts methods of tasks.
        failures: Tracebacks.
    """

    settings: Settings
    tasks: dict[str, list[Task]]
    journals: dict[str, Journal]
    bar: Any
    failures: list[str] = field(default_factory=list)

    def keep(
        self, job: Job, method: str, scores: Sequence[Score], seconds: float
    ) -> None:
        task = self.tasks[job.experiment][job.index]
        self.journals[job.experiment].write(task, method, scores, seconds)
        self.bar.set_postfix_str(" ".join(map(str, (*task.name, method))))
        self.bar.update()

    def fail(self, job: Job, text: str) -> None:
        task = self.tasks[job.experiment][job.index]
        self.failures.append(f"{task.name}: {text}")
        self.bar.write(self.failures[-1])


class Only(NamedTuple):
    """What is run; None for all.

    Attributes:
        methods: Which.
        networks: On which.
    """

    methods: Sequence[str] | None = None
    networks: Sequence[str] | None = None

    def of(self, task: Task, todo: Sequence[str]) -> list[str]:
        """Methods of a task that are named, of those that are still to do."""
        if self.networks is not None and task.variant not in self.networks:
            return []
        return [each for each in todo if self.methods is None or each in self.methods]

    def check(self, tasks: Mapping[str, Sequence[Task]]) -> None:
        """Refuses a name that none of the experiments has."""
        every = [task for made in tasks.values() for task in made]
        there = {
            "Methods": (self.methods, [part for t in every for part in t.methods]),
            "Networks": (self.networks, [task.variant for task in every]),
        }
        for words, (named, known) in there.items():
            for name in named or ():
                if name not in known:
                    choices = ", ".join(map(repr, dict.fromkeys(known)))
                    raise ValueError(
                        f"{words} must be among those of {', '.join(tasks)}; got "
                        f"{name!r}. Choose from: {choices}."
                    )


_ALL = Only()


def run(
    experiments: Mapping[str, Experiment],
    settings: Settings,
    only: Only = _ALL,
    workers: int = 1,
) -> list[str]:
    """Runs what is not done yet, and says what failed.

    Args:
        experiments: By name; importable, where processes of their own run them.
        settings: Of the run.
        only: Methods and networks that are run.
        workers: Processes.

    Raises:
        ValueError: If none of the experiments has a method or network that is named.
    """
    tasks = {name: made.tasks(settings) for name, made in experiments.items()}
    only.check(tasks)
    journals = {
        name: Journal(settings.out / f"{name}.jsonl", settings.scale) for name in tasks
    }
    jobs = []
    for name, own in tasks.items():
        for index, task in enumerate(own):
            if todo := only.of(task, journals[name].todo(task)):
                jobs.append(Job(name, index, todo))
    with tqdm(total=sum(len(job.methods) for job in jobs), unit="method") as bar:
        state = Run(settings, tasks, journals, bar)
        if workers == 1:
            _run_here(state, jobs)
        else:
            _run_apart(state, experiments, jobs, workers)
    return state.failures


def _scored(
    task: Task, methods: Sequence[str], device: str
) -> Iterator[tuple[str, list[Score], float]]:
    """Methods, their scores and seconds: the processor's, or on a GPU the wall's."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    for method, scores in task.run(methods):
        yield method, scores, clock() - start
        start = clock()


def _run_here(state: Run, jobs: Sequence[Job]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other on layers this small
    try:
        for job in jobs:
            task = state.tasks[job.experiment][job.index]
            try:
                for found in _scored(task, job.methods, state.settings.device):
                    state.keep(job, *found)
            except Exception:  # the other tasks are still worth running
                state.fail(job, traceback.format_exc())
    finally:
        torch.set_num_threads(threads)


def _run_apart(
    state: Run,
    experiments: Mapping[str, Experiment],
    jobs: Sequence[Job],
    workers: int,
) -> None:
    # A forked process cannot use a GPU, and inherits the state of torch's threads.
    context = multiprocessing.get_context("spawn")
    waiting, busy = list(reversed(jobs)), dict[Any, Job]()
    processes = []
    for _ in range(min(workers, len(jobs))):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, experiments, state.settings), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        busy[ours] = waiting.pop()
        ours.send(busy[ours])
    while busy:
        for pipe in wait(list(busy)):
            job = busy[pipe]
            try:
                kind, content = pipe.recv()
            except EOFError:
                state.fail(job, "its process ended")
                del busy[pipe]
                continue
            if kind == "scores":
                state.keep(job, *content)
                continue
            if kind == "failed":
                state.fail(job, content)
            del busy[pipe]
            if waiting:
                busy[pipe] = waiting.pop()
            pipe.send(busy.get(pipe))
    for process in processes:
        process.join()


def _serve(
    pipe: Connection, experiments: Mapping[str, Experiment], settings: Settings
) -> None:
    """Runs the jobs that come, until None comes or the parent is gone."""
    torch.set_num_threads(1)
    try:
        while (job := pipe.recv()) is not None:
            try:
                task = experiments[job.experiment].tasks(settings)[job.index]
                for found in _scored(task, job.methods, settings.device):
                    pipe.send(("scores", found))
            except BrokenPipeError:
                raise
            except Exception:
                pipe.send(("failed", traceback.format_exc()))
            else:
                pipe.send(("done", None))
    except (BrokenPipeError, EOFError, ConnectionResetError):
        return
