"""`python -m bench.record`: all that one GPU can tell about the package, in the order of what one wants to know first.

It runs the GPU's tests and the self-check, times a copy, tunes, times every provider on every problem, the host and training, and looks
for errors with compute-sanitizer. After each step it keeps what it has in DIR: record.json, a page (record.md) with its pictures, and the
log of all steps. What does not fit into the minutes is left out, and the page says so; --resume goes on with it, also on another day, with
the same GPU and commit.

    python -m bench.record --minutes 50 --out out/record
    python -m bench.record --minutes 20 --out out/record --resume
    python -m bench.record --apply out/record     puts page, results, table and README's picture in their places
    python -m bench.record --rehearse             the same without a GPU, with stand-ins: shows that it works, measures nothing

Exit status: 0; 1 if a step failed; 2 for wrong arguments; 69 without a GPU.
"""

import argparse
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from bench import records
from bench.record.apply import apply
from bench.record.page import PAGE
from bench.record.rehearsal import METADATA, small
from bench.record.run import RECORD, Recorder

MINUTES = 50


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the budget (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything goes (default: out/record)")
    parser.add_argument("--resume", action="store_true", help="go on with the record in DIR")
    parser.add_argument("--rehearse", action="store_true", help="measure stand-ins, without a GPU; everything is marked as a rehearsal")
    parser.add_argument("--apply", type=Path, metavar="DIR", help="put the record in DIR in its places in this checkout, and nothing else")
    options = parser.parse_args(arguments)
    if options.apply:
        try:
            apply(options.apply)
        except (OSError, ValueError) as error:
            parser.error(f"--apply: {error}")
        return 0

    if not options.rehearse:
        records.gpu()
    out = options.out or Path("out/rehearsal" if options.rehearse else "out/record")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    recorder = Recorder(out, records.metadata() | (METADATA if options.rehearse else {}), options.rehearse)
    if (out / RECORD).exists():
        if not options.resume:
            parser.error(f"{out} holds a record: --resume goes on with it")
        if reason := recorder.resume():
            parser.error(f"--resume: {reason}")
    with small() if options.rehearse else nullcontext():  # problems, for whose sizes the pictures ask
        recorder.run(options.minutes)
    print(out / PAGE)
    return int(any(step["status"] == "failed" for step in recorder.record["steps"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step, which is in a session of its own, is ended, too
    raise SystemExit(main())
