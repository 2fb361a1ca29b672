"""Loads a layer, its argument, that was saved patched, and patches where transformers cannot be imported. Prints the outcomes."""

import sys

import torch

import triton_rmsnorm

triton_rmsnorm.kernel_mapping()
assert not {"transformers", "kernels"} & sys.modules.keys()  # the package does not import them
sys.modules["transformers"] = None

layer = torch.load(sys.argv[1], weights_only=False)
print(*layer(torch.ones(2, 16)).shape, *[row.status for row in triton_rmsnorm.patch(layer, fuse_residual=True).rows])
print(triton_rmsnorm.patch(torch.nn.RMSNorm(8)).replaced)
try:
    triton_rmsnorm.patch("llama")
except ImportError as error:
    print(error)
