"""Patches a module and then a model type where transformers cannot be imported, and prints what comes of it."""

import sys

sys.modules["transformers"] = None

import torch

import triton_rmsnorm

print(triton_rmsnorm.patch(torch.nn.RMSNorm(8)).replaced)
try:
    triton_rmsnorm.patch("llama")
except ImportError as error:
    print(error)
