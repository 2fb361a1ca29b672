"""Patches a module and then a model type where transformers cannot be imported, and prints what comes of it."""

import sys

import torch

import triton_rmsnorm

sys.modules["transformers"] = None

assert not any(name.startswith("transformers.") for name in sys.modules)  # the package does not import it
print(triton_rmsnorm.patch(torch.nn.RMSNorm(8)).replaced)
try:
    triton_rmsnorm.patch("llama")
except ImportError as error:
    print(error)
