"""A plugin for axolotl.

.. code-block:: yaml

    plugins:
      - triton_rmsnorm.integrations.axolotl.TritonRMSNormPlugin
    triton_rmsnorm_fuse_residual: true
    triton_rmsnorm_recompute: true
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel
from torch import nn

from triton_rmsnorm.patching import patch


class TritonRMSNormArgs(BaseModel):
    """What the configuration may say."""

    triton_rmsnorm_fuse_residual: bool = False
    triton_rmsnorm_recompute: bool = False


class TritonRMSNormPlugin(BasePlugin):
    """Patches the model as soon as it is built, before adapters and parallelism."""

    def get_input_args(self) -> str:
        return f"{__name__}.TritonRMSNormArgs"

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        options = {name: bool(cfg[f"triton_rmsnorm_{name}"]) for name in ("fuse_residual", "recompute")}
        get_logger(f"axolotl.{__name__}").info("%s", patch(model, **options))  # axolotl shows what is logged under its own name
