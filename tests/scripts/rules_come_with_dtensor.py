"""The rules are registered when the first call through the operator is made after torch.distributed.tensor was imported."""

import sys

import torch
import torch.distributed.tensor

import triton_rmsnorm

with torch._subclasses.FakeTensorMode():
    triton_rmsnorm.rms_norm(torch.ones(2, 8), (8,))
assert "triton_rmsnorm.distributed" in sys.modules
