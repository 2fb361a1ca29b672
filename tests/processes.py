"""Code that cannot run in the process of the tests, in which Triton interprets."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any
from unittest import mock


@cache
def _pool() -> ProcessPoolExecutor:
    """One process, which imports torch and Triton once for all tests of a worker."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with mock.patch.dict(os.environ, environment, clear=True):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()
    return pool


def compiled(function: Callable, *arguments: Any) -> Any:
    """What a function of a module returns in a process in which Triton compiles. It must leave that process as it was."""
    return _pool().submit(function, *arguments).result()
