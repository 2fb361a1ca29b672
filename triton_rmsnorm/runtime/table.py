"""Measured configurations, and the choice between them and the analytic one. Needs no GPU, no torch and no Triton.

A table is a JSON file for one device: the fastest configuration of each key, with its time, the date and the versions. Tables of GPU models
are shipped in `tuned/` (`python -m bench.tune` writes them); autotuning keeps its own in the user's cache. A table applies only to an
identical Device; the Triton version matters only through `max_ctas`. Whatever cannot be read is ignored with a warning.
"""

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from triton_rmsnorm.runtime.config import Config, Device, Key, analytic, is_valid

SHIPPED = Path(__file__).parent.parent / "tuned"


class Measured(NamedTuple):
    """The fastest configuration of a key, and its time beside that of the analytic choice, in µs."""

    config: Config
    us: float
    analytic_us: float


Table = dict[Key, Measured]

search: Callable[[Key, Device], Measured | None] | None = None  # autotuning puts its search in here


def choose(key: Key, device: Device) -> Config:
    """The shipped configuration of `key`; else what autotuning finds, where it is on; else the analytic choice."""
    measured = shipped(device).get(key)
    if measured is None and search is not None and device.backend != "interpreter":
        measured = search(key, device)
    return measured.config if measured else analytic(key, device)


@cache
def shipped(device: Device) -> Table:
    """The shipped table of the device; empty if there is none."""
    return {key: measured for path in sorted(SHIPPED.glob("*.json")) for key, measured in read(path, device).items()}


def file_name(device: Device) -> str:
    """nvidia-h200.json, or nvidia-h200-16-ctas.json where a row may be spread over 16 thread blocks."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return f"{slug}-{device.max_ctas}-ctas.json" if device.max_ctas > 1 else f"{slug}.json"


def read(path: Path, device: Device) -> Table:
    """The table in a file: its entries for `device` that are valid. Warns once about everything else."""
    table, bad = {}, []
    try:
        content = json.loads(path.read_text())
        if Device(**content["device"]) != device:
            return {}
        entries = list(content["entries"])
    except FileNotFoundError:
        return {}
    except Exception as error:  # a file may hold anything: numbers too large for a float, lists too deep for the parser
        warnings.warn(f"{path} is ignored, because it is not a table of configurations: {error!r}", stacklevel=2)
        return {}
    for entry in entries:
        try:
            key, measured = _entry(entry)
            if not is_valid(measured.config, key, device):
                raise ValueError(f"{measured.config} is not valid on {device.name}")
            table[key] = measured
        except Exception as error:
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
    scratch = path.with_name(f"{path.name}.{os.getpid()}")  # readers see either the old file or the new one
    scratch.write_text(json.dumps({"device": device._asdict(), **about, "entries": entries}, indent=1) + "\n")
    scratch.replace(path)


def _entry(entry: dict) -> tuple[Key, Measured]:
    key, config = Key(**entry["key"]), Config(**entry["config"])
    _check_types(key._asdict(), Key("forward", 1, 2, 2)._asdict())
    _check_types(asdict(config), asdict(Config(1, 1, 1)))
    if key.direction not in ("forward", "backward") or key.kind not in ("plain", "residual", "gate"):
        raise ValueError(f"unknown direction or kind: {key}")
    return key, Measured(config, float(entry["us"]), float(entry["analytic_us"]))


def _check_types(values: dict, examples: dict) -> None:
    for name, value in values.items():
        if type(value) is not type(examples[name]):
            raise TypeError(f"{name} must be of type {type(examples[name]).__name__}, got {value!r}")
