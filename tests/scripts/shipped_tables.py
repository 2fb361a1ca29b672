"""Prints where triton_rmsnorm was imported from, and the configurations in its shipped tables for sm_90."""

import triton_rmsnorm
from triton_rmsnorm.runtime import config, table

print(triton_rmsnorm.__file__)
for measured in table.shipped(config.SM_90).values():
    print(measured.config)
