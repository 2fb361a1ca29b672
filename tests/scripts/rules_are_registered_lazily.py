"""Neither the import nor a call brings torch.distributed.tensor, which takes half a second.

The rules are registered when the first call through the operator is made after something else has imported it.
"""

import sys

import torch

before = set(sys.modules)
import triton_rmsnorm  # noqa: E402

x = torch.randn(2, 8, requires_grad=True)
triton_rmsnorm.RMSNorm(8)(x).sum().backward()
new = set(sys.modules) - before
assert not [name for name in new if name.startswith("torch.distributed.tensor") or name == "triton_rmsnorm.distributed"], new
assert "torch.distributed.tensor" not in before, "torch itself imports it"

import torch.distributed.tensor  # noqa: E402

with torch._subclasses.FakeTensorMode():
    triton_rmsnorm.rms_norm(torch.ones(2, 8), (8,))
assert "triton_rmsnorm.distributed" in sys.modules
