"""Tasks in processes, where a task that kills its process or hangs costs only itself."""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError, as_completed
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm
from transformers.models.auto.configuration_auto import model_type_to_module_name

from bench.census.classes import classes_of
from bench.census.compare import census
from bench.census.page import differences

TASKS = 200  # per process, whose memory grows with what it has imported
SECONDS = 600  # after which a task is killed


def run(types: list[str], workers: int) -> list[dict]:
    """Results for every model type, and for every package that their models come from."""
    packages = sorted({f"transformers.models.{model_type_to_module_name(one)}" for one in types})
    tasks = [("type", one) for one in types] + [("package", one) for one in packages]
    results = []
    with tqdm(total=len(tasks), unit="task", mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        for (kind, name), result, failure in in_processes(_run, tasks, workers, SECONDS):
            results.append(result or {kind: name, "stage": "run", "error": failure, "differs": failure})
            bar.set_postfix_str(name.rpartition(".")[2], refresh=False)
            bar.update()
            for line in differences(results[-1:]):
                bar.write(line)
    return sorted(results, key=lambda result: ("package" in result, result.get("type") or result["package"]))


def _run(task: tuple[str, str]) -> dict:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return {"type": census, "package": classes_of}[task[0]](task[1])


def in_processes(function: Callable, tasks: Iterable, workers: int, seconds: float) -> Iterator[tuple[Any, Any, str]]:
    """Task, result and failure of each, in the order in which they end. A task that fails has no result.

    Args:
        function: of a task; both are pickled.
        seconds: a task that takes longer is killed.
    """
    with ProcessPool(workers, max_tasks=TASKS, context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.schedule(function, args=[task], timeout=seconds): task for task in tasks}
        for future in as_completed(futures):
            result, failure = None, ""
            try:
                result = future.result()
            except ProcessExpired as error:
                failure = f"its process ended with exit code {error.exitcode}"
            except TimeoutError:
                failure = f"it took more than {seconds} seconds"
            yield futures[future], result, failure
