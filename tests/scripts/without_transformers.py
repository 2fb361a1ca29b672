"""Patches a module and then a model type where transformers cannot be imported, and prints what comes of it."""

import sys

import torch

import triton_rmsnorm

triton_rmsnorm.kernel_mapping()
assert not {"transformers", "kernels"} & sys.modules.keys()  # the package does not import them
sys.modules["transformers"] = None

print(triton_rmsnorm.patch(torch.nn.RMSNorm(8)).replaced)
try:
    triton_rmsnorm.patch("llama")
except ImportError as error:
    print(error)
