"""How DTensors pass through the operators. Registered when the first call is made after torch.distributed.tensor was imported."""

from functools import cache
from typing import Any

import torch


@torch.compiler.assume_constant_result  # torch.compile runs it and does not trace it
def register() -> None:
    """Makes the rules known, once."""
    _register()


@cache
def _register() -> None:
    """Teaches DTensor both operators: rows may be sharded over any outer dimension, without a collective; dweight is then a partial sum."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def sharded(x: Any, normalized_shape: Any) -> list[Any]:
        """The placements of tensors of rows that the kernels accept on one mesh dimension."""
        return [Replicate(), *(Shard(dim) for dim in range(len(x.shape) - len(normalized_shape)))]

    def where(tensor: Any, placement: Any) -> Any:
        return None if tensor is None else placement

    @register_sharding(torch.ops.triton_rmsnorm.forward.default)
    def forward(x: Any, weight: Any, residual: Any, gate: Any, normalized_shape: Any, *rest: Any) -> list[Any]:
        return [
            (
                [rows, rows, Replicate() if residual is None else rows],
                [rows, where(weight, Replicate()), where(residual, rows), where(gate, rows), None, *(None for _ in rest)],
            )
            for rows in sharded(x, normalized_shape)
        ]

    @register_sharding(torch.ops.triton_rmsnorm.backward.default)
    def backward(
        dy: Any, dresidual_out: Any, x: Any, weight: Any, gate: Any, rstd: Any, x_dtype: Any, needs: Any, normalized_shape: Any, *rest: Any
    ) -> list[Any]:
        needs_dx, needs_dweight, needs_dresidual, needs_dgate = needs
        placements = []
        for rows in sharded(x, normalized_shape):
            dx, dresidual, dgate = (rows if needed else Replicate() for needed in (needs_dx, needs_dresidual, needs_dgate))
            dweight = Partial() if isinstance(rows, Shard) and needs_dweight else Replicate()
            inputs = [rows, where(dresidual_out, rows), rows, where(weight, Replicate()), where(gate, rows), rows]
            placements.append(([dx, dweight, dresidual, dgate], [*inputs, None, None, None, *(None for _ in rest)]))
        return placements
