"""Processes that die or hang cost their task and nothing else."""

import os
import signal
import time

from bench.workers import in_processes


def work(task):
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hangs":
        time.sleep(600)
    return 2 * task


def test_processes_that_die_or_hang():
    tasks = ["a", "dies", "hangs", "b", "c"]
    outcomes = {task: (result, failure) for task, result, failure in in_processes(work, tasks, workers=2, seconds=10)}
    assert outcomes.pop("dies") == (None, "its process ended with exit code -9")
    assert outcomes.pop("hangs") == (None, "it took too long")
    assert outcomes == {task: (2 * task, "") for task in "abc"}
