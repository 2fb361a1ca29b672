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
from triton_rmsnorm.recompute import recompute_norms


class TritonRMSNormArgs(BaseModel):
    """What the configuration may say."""

    triton_rmsnorm_fuse_residual: bool = False
    triton_rmsnorm_recompute: bool = False


class TritonRMSNormPlugin(BasePlugin):
    """Patches the model as soon as it is built, before adapters and parallelism."""

    def get_input_args(self) -> str:
        return f"{__name__}.TritonRMSNormArgs"

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        # axolotl shows what is logged under its own name.
        get_logger(f"axolotl.{__name__}").info("%s", patch(model, fuse_residual=bool(cfg.triton_rmsnorm_fuse_residual)))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.triton_rmsnorm_recompute:
            trainer.compute_loss = recompute_norms()(trainer.compute_loss)
