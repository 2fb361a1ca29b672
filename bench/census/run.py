"""Tasks in processes, where a task that kills its process or hangs costs only itself."""

import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm
from transformers.models.auto.configuration_auto import model_type_to_module_name

from bench import records
from bench.census.classes import classes_of
from bench.census.compare import census
from bench.census.page import differences

TASKS = 200  # per process, whose memory grows with what it has imported
SECONDS = 600  # after which a task is killed


def run(types: list[str], workers: int, metadata: dict, progress: Path) -> list[dict]:
    """Results for every model type, and for every package that their models come from.

    Args:
        types: model types.
        workers: number of processes.
        metadata: what results depend on.
        progress: file to which results are appended as they come. Those of a run that ended early, with the same metadata except the date,
            are taken from there.
    """
    packages = sorted({f"transformers.models.{model_type_to_module_name(one)}" for one in types})
    tasks = [("type", one) for one in types] + [("package", one) for one in packages]
    head = json.dumps(records.undated(metadata)) + "\n"
    before, *lines = (progress.read_text() if progress.exists() else "").splitlines(keepends=True) or [""]
    results = [json.loads(line) for line in lines if line.endswith("\n")] if before == head else []
    results = [one for one in results if _task(one) in tasks]
    progress.parent.mkdir(parents=True, exist_ok=True)
    done = {_task(one) for one in results}
    with (
        progress.open("w") as file,
        tqdm(total=len(tasks), initial=len(done), unit="task", mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar,
    ):
        file.writelines([head, *(json.dumps(one) + "\n" for one in results)])
        for (kind, name), result, failure in in_processes(_run, [task for task in tasks if task not in done], workers, SECONDS):
            results.append(result or {kind: name, "stage": "run", "error": failure, "differs": failure})
            file.write(json.dumps(results[-1]) + "\n")
            file.flush()
            bar.set_postfix_str(name.rpartition(".")[2], refresh=False)
            bar.update()
            for line in differences(results[-1:]):
                bar.write(line)
    progress.unlink()
    return sorted(results, key=lambda result: ("package" in result, _task(result)))


def _task(result: dict) -> tuple[str, str]:
    kind = "type" if "type" in result else "package"
    return kind, result[kind]


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
