"""Configurations that were measured, and the choice between them and the analytic one. No GPU, torch or Triton needed.

A table is a JSON file of one device: what was measured on it, when, with which versions. Tables of GPU models are shipped in `tuned/`
(`python -m bench.tune` writes them); autotuning keeps its own in the user's cache. A table holds for devices equal to its own: Triton's
version counts as far as it shows there, in the thread blocks that a row may be spread over. What cannot be read is ignored with a warning.
"""

import json
import os
import re
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from triton_rmsnorm.runtime import config as tuning
from triton_rmsnorm.runtime.config import Config, Device

SHIPPED = Path(__file__).parent.parent / "tuned"


class Key(NamedTuple):
    """What a configuration depends on, besides the device: never the number of rows."""

    direction: str  # "forward" or "backward"
    n: int
    itemsize: int  # bytes an element of the widest tensor of rows
    weight_itemsize: int  # 0: no weight
    loads: int  # tensors of rows that are read
    stores: int  # and written


class Measured(NamedTuple):
    """The fastest configuration of a key, and its time beside that of the analytic choice, in µs."""

    config: Config
    us: float
    analytic_us: float


Table = dict[Key, Measured]

found: dict[Device, Table] = {}  # by autotuning, in this process or from its cache
asked = 0  # how many autotuning contexts are open


def choose(key: Key, device: Device) -> Config:
    """What was measured for `key`, by autotuning or before shipping; else what autotuning finds, if asked for; else the analytic choice."""
    measured = found.get(device, {}).get(key) or shipped(device).get(key)
    if measured is None and device.backend != "interpreter" and (asked or os.environ.get("TRITON_RMSNORM_AUTOTUNE") == "1"):
        from triton_rmsnorm.runtime import autotune  # it launches kernels: above this module, and only for those who ask

        measured = autotune.tune(key, device)
    return measured.config if measured else analytic(key, device)


def analytic(key: Key, device: Device) -> Config:
    config = tuning.forward_config if key.direction == "forward" else tuning.backward_config
    return config(key.n, key.itemsize, key.weight_itemsize, device, key.loads, key.stores)


def runs(config: Config, key: Key, device: Device) -> bool:
    """Whether the kernels can run `config`: powers of 2, within what the device has, and with no more traffic than allowed."""
    powers = (config.block_m, config.block_n, config.num_warps, config.num_ctas)
    if min(powers) < 1 or any(power & (power - 1) for power in powers) or config.num_stages < 1 or config.programs < 1:
        return False
    if config.load_policy not in tuning.LOAD_POLICIES or config.store_policy not in tuning.STORE_POLICIES:
        return False
    tile = config.block_m * config.block_n // config.num_ctas  # elements that a thread block holds
    threads = config.num_warps * (64 if device.backend == "hip" else 32)
    prefetched = (config.num_stages - 1) * tile * key.loads * key.itemsize
    forward = key.direction == "forward"
    overhead = tuning.FORWARD_OVERHEAD if forward else tuning.BACKWARD_OVERHEAD
    program_bytes = key.weight_itemsize + (0 if forward else 2 * max(4, key.weight_itemsize))
    budget = tuning._program_budget(overhead, (key.loads + key.stores) * key.itemsize, program_bytes)
    return (
        threads <= min(1024, tile)
        and tile <= 1 << 20
        and prefetched <= device.shared_memory
        and config.num_ctas <= device.max_ctas
        and (config.num_ctas == 1 or (config.block_m == 1 and config.block_n >= key.n))
        and config.programs <= max(budget, 1)
    )


@cache
def shipped(device: Device) -> Table:
    """The shipped table of the device; empty if there is none."""
    return {key: measured for path in sorted(SHIPPED.glob("*.json")) for key, measured in read(path, device).items()}


def file_name(device: Device) -> str:
    """nvidia-h200.json, or nvidia-h200-16-ctas.json where a row may be spread over 16 thread blocks."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return f"{slug}-{device.max_ctas}-ctas.json" if device.max_ctas > 1 else f"{slug}.json"


def read(path: Path, device: Device) -> Table:
    """The table in a file, as far as it is one, is of `device`, and its configurations run there. Warns once of what is not."""
    table, bad = {}, []
    try:
        content = json.loads(path.read_text())
        if Device(**content["device"]) != device:
            return {}
        entries = list(content["entries"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is no table of configurations and is ignored: {error!r}", stacklevel=2)
        return {}
    for entry in entries:
        try:
            key, measured = _entry(entry)
            if not runs(measured.config, key, device):
                raise ValueError(f"{measured.config} does not run")
            table[key] = measured
        except (ValueError, KeyError, TypeError) as error:
            bad.append(f"{entry!r}: {error!r}")
    if bad:
        warnings.warn(f"{len(bad)} of {len(entries)} entries of {path} are ignored, the first because of {bad[0]}", stacklevel=2)
    return table


def write(path: Path, device: Device, table: Table, **about: Any) -> None:
    """Writes a table, and what else is known about it: versions, date, commit."""
    entries = [
        {"key": key._asdict(), "config": asdict(measured.config), "us": measured.us, "analytic_us": measured.analytic_us}
        for key, measured in sorted(table.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")  # readers see the old file or the new one
    scratch.write_text(json.dumps({"device": asdict(device), **about, "entries": entries}, indent=1) + "\n")
    scratch.replace(path)


def _entry(entry: dict) -> tuple[Key, Measured]:
    key, config = Key(**entry["key"]), Config(**entry["config"])
    integers = (*key[1:], *(value for name, value in asdict(config).items() if not name.endswith("_policy")))
    if key.direction not in ("forward", "backward") or any(type(value) is not int for value in integers):
        raise ValueError("not a direction, or not integers")
    return key, Measured(config, float(entry["us"]), float(entry["analytic_us"]))
