"""`python -m bench.cost`: what the norms of a decoder layer cost, beside what else computes them, counted without a GPU.

For one decoder layer of several models: launches, bytes read and written, and bytes kept for the backward, by the norms and by the whole
layer, forward and backward. Nothing is timed and nothing is estimated; bench/cost/count.py says how each number is counted, and a dash
stands for what cannot be counted. The result is a table, a file in bench/results/, and a picture beside it.

Exit status: 0; 1 if nothing could be counted.
"""

import argparse
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain

from bench import records
from bench.census.tiny_models import unknown
from bench.cost import report
from bench.cost.layers import MODELS, rows
from bench.problem import DTYPES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="+", default=[*MODELS], help=f"of {', '.join(MODELS)}, or model types of transformers")
    parser.add_argument("--tokens", type=records.positive, default=4096, help="of one sequence (default: %(default)s)")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "fp64"], default="bf16")
    parser.add_argument("--jobs", type=records.positive, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    for reason in filter(None, map(unknown, {*options.model} - {*MODELS})):
        parser.error(f"--model {reason}")
    count = partial(rows, tokens=options.tokens, dtype=options.dtype)
    if min(options.jobs, len(options.model)) > 1:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            counted = list(pool.map(count, options.model))
    else:
        counted = list(map(count, options.model))
    record = {"metadata": records.metadata(), "tokens": options.tokens, "dtype": options.dtype, "rows": [*chain(*counted)]}
    print(report.markdown(record))
    if not any("costs" in row for row in record["rows"]):
        return 1
    of_others = [] if options.model == [*MODELS] else options.model
    file = records.RESULTS / f"{'-'.join(['cost', options.dtype, str(options.tokens), *of_others])}.json"  # the same at each run
    records.write(file, record, lines="rows")
    report.picture(record).savefig(file.with_suffix(".png"), dpi=140)
    print(f"\n{file}\n{file.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
