"""A pool of processes in which a task that kills its process, or hangs, costs only itself."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

TASKS = 200  # of one process: its memory grows with what it has imported
_SPAWN = multiprocessing.get_context("spawn")


class _Worker:
    def __init__(self, function: Callable):
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0
        self.task: Any = None

    def give(self, task: Any, seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        self.pipe.send(task)

    def outcome(self) -> tuple[Any, str]:
        """What became of the task: a result, or why there is none; then the process is gone."""
        if self.pipe.poll():
            try:
                self.done += 1
                return self.pipe.recv(), ""
            except (EOFError, OSError):
                self.process.join()
                return None, f"its process ended with exit code {self.process.exitcode}"
        self.process.kill()
        return None, "it took too long"

    def end(self) -> None:
        self.pipe.close()  # which it waits on
        self.process.join()


def _serve(function: Callable, pipe: Connection) -> None:
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(function(task))


def in_processes(function: Callable, tasks: Iterable, workers: int, seconds: float) -> Iterator[tuple[Any, Any, str]]:
    """Task, result and failure, in the order in which they end; a task that fails has no result.

    Args:
        function: of a task; both are pickled.
        workers: how many processes there are at a time.
        seconds: a task that takes longer is killed. A process's start counts with its first task.
    """
    remaining = iter(tasks)
    idle = [_Worker(function) for _ in range(workers)]
    busy: list[_Worker] = []
    while True:
        for task in remaining:
            worker = idle.pop()
            worker.give(task, seconds)
            busy.append(worker)
            if not idle:
                break
        if not busy:
            break
        wait([worker.pipe for worker in busy], max(0.0, min(worker.deadline for worker in busy) - time.monotonic()))
        for worker in [one for one in busy if one.pipe.poll() or time.monotonic() > one.deadline]:
            busy.remove(worker)
            result, failure = worker.outcome()
            yield worker.task, result, failure
            if failure or worker.done == TASKS:
                worker.end()
                worker = _Worker(function)
            idle.append(worker)
    for worker in idle:
        worker.end()
