"""Every kernel compiles for the GPUs we name, in the configurations that tuning chooses for them, on a machine that has none.

What test_audit.py compiles is left out here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_rmsnorm.runtime import config as tuning

SCRIPT = Path(__file__).with_name("compile_offline.py")


@pytest.mark.parametrize("device", [tuning.SM_90, tuning.SM_100, tuning.SM_80, tuning.GFX942], ids=lambda device: device.name)
def test_compiles(device, request):
    """In a Python of its own: kernels that were imported for the interpreter cannot be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, device.name, *(["--all"] if request.config.getoption("--compile-all") else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, "\n".join([line for line in done.stdout.splitlines() if not line.endswith("compiled")] + [done.stderr])


POLICIES = """
from dataclasses import replace
from bench.launches import Problem, launches
from bench.offline import TARGETS, compile_for
from triton_rmsnorm.runtime import table as measured
target, choose = TARGETS["sm_80"], measured.choose
measured.choose = lambda key, device: replace(choose(key, device), num_stages=1, load_policy="evict_first", store_policy=".cs")
for direction in ("forward", "backward"):
    recorded = launches(Problem(direction, "plain", "bf16", "bf16", 1024), 64, target.device).recorded[0]
    ptx = compile_for(recorded, target.gpu).asm["ptx"]
    assert "evict_first" in ptx and "st.global.cs" in ptx, direction
"""


def test_cache_policies_reach_the_code():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", POLICIES], env=env, cwd=SCRIPT.parents[1], check=True)
