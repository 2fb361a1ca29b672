"""A task of test_hf_census.py, in a module that processes import quickly."""

import os
import signal
import time


def work(task: str) -> str:
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hangs":
        time.sleep(600)
    return 2 * task
