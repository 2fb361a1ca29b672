"""Prints the search that the package installs when it is imported outside the interpreter, TRITON_RMSNORM_AUTOTUNE being the argument."""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_RMSNORM_AUTOTUNE"] = sys.argv[1]

from triton_rmsnorm.runtime import table

print(getattr(table.search, "__name__", None))
