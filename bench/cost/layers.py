"""The layers that are counted, and who computes their norms: models of transformers without memory, equipped by each provider."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import triton_rmsnorm
from bench.cost.count import GPU, Counts, count
from bench.problem import DTYPES
from bench.traffic import UncountableError
from triton_rmsnorm.patching.recognition import recognize
from triton_rmsnorm.patching.semantics import Norm


class Model(NamedTuple):
    """A type of transformers with the configuration of one of its models; of the hybrid, the layer type that has a gated norm."""

    model_type: str
    config: dict[str, Any]
    uncounted: str = ""  # a function of the modeling file that is left out, since its kernels run on GPUs only


MODELS = {
    "Llama-3-8B": Model("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "Qwen3-8B": Model(
        "qwen3",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Gemma-3-12B": Model(
        "gemma3_text",
        {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "sliding_window": 1024,
        },
    ),
    "Qwen3.5-9B": Model(
        "qwen3_5_text",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention"],
        },
        uncounted="torch_chunk_gated_delta_rule",
    ),
}


class Provider(NamedTuple):
    """Who computes the norms of a model."""

    equip: Callable[[PreTrainedModel, list[tuple[nn.Module, Norm]]], int]  # returns how many of the norms it computes
    context: Callable[[], AbstractContextManager] = nullcontext
    package: str | None = None  # which may be missing


def _each(
    make: Callable[[Norm, Tensor | None, float], Callable | None], model: PreTrainedModel, norms: list[tuple[nn.Module, Norm]]
) -> int:
    """Gives each norm a forward of its own, where there is one."""
    computed = 0
    for module, norm in norms:
        weight = None if norm.weight is None else getattr(module, norm.weight)
        forward = make(norm, weight, getattr(module, norm.eps) if isinstance(norm.eps, str) else norm.eps)
        if forward is not None:
            module.forward = forward
            computed += 1
    return computed


def _composite(norm: Norm, weight: Tensor | None, eps: float) -> Callable | None:
    """torch.nn.functional.rms_norm as torch computes it of several operations."""
    activation = norm.semantics.activation

    def forward(x: Tensor, gate: Tensor | None = None) -> Tensor:
        factor = weight + norm.semantics.weight_offset if weight is not None and norm.semantics.weight_offset else weight
        y = F.rms_norm(x, x.shape[-1:], factor, eps)
        return y if gate is None or activation is None else y * getattr(F, activation)(gate)

    return forward


def _liger(norm: Norm, weight: Tensor | None, eps: float) -> Callable | None:
    """As Liger's own patches: in the casting mode of the model, with the gradient in place but for Gemma."""
    if norm.semantics.activation is not None or norm.semantics.group_size is not None:
        return None
    function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    offset = norm.semantics.weight_offset
    casting = "llama" if norm.semantics.x_hat_rounding == "input" else "gemma"
    return lambda x: function.apply(x, weight, eps, offset, casting, not offset, None)


def _fla(norm: Norm, weight: Tensor | None, eps: float) -> Callable | None:
    if norm.semantics.weight_offset or norm.semantics.group_size is not None:
        return None
    if norm.semantics.activation is None:
        rms_norm = importlib.import_module("fla.modules.norm.layernorm").rms_norm
        return lambda x: rms_norm(x, weight, None, eps=eps)
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
    activation = {"silu": "swish", "sigmoid": "sigmoid"}.get(norm.semantics.activation)
    if activation is None or not norm.semantics.norm_before_gate:
        return None
    return lambda x, gate: gated(x, gate, weight, None, activation, eps=eps)


def _ours(model: PreTrainedModel, norms: list[tuple[nn.Module, Norm]], **options: bool) -> int:
    return triton_rmsnorm.patch(model, **options).replaced


class _OnPaper(TorchFunctionMode):
    """Tensors without memory call themselves tensors of a GPU: Liger counts multiprocessors only for those."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", 0)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("cuda", 0):
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextmanager
def _as_on_gpu(package: str | None) -> Iterator[None]:
    """A peer's package sees as many multiprocessors as the GPU that ours is configured for has."""
    with ExitStack() as stack:
        if package == "liger_kernel":
            liger = importlib.import_module("liger_kernel.ops.rms_norm")
            backward = liger.rms_norm_backward

            def on_paper(*args: Any, **kwargs: Any) -> Any:
                with _OnPaper():
                    return backward(*args, **kwargs)

            properties = SimpleNamespace(multi_processor_count=GPU.num_sms)
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
            stack.enter_context(mock.patch.object(liger, "device_context", lambda _: nullcontext()))
            stack.enter_context(mock.patch.object(liger, "rms_norm_backward", on_paper))
        elif package == "fla":
            for name in ("fla.modules.norm.layernorm", "fla.modules.norm.fused_norm_gate"):
                module = importlib.import_module(name)
                stack.enter_context(mock.patch.object(module, "get_multiprocessor_count", lambda *_: GPU.num_sms))
        yield


HF, OURS, FUSED, RECOMPUTED = "Hugging Face eager", "ours", "ours, residual fused", "ours, fused, recomputed"
PROVIDERS = {
    HF: Provider(lambda model, norms: len(norms)),
    "torch composite": Provider(partial(_each, _composite)),
    "Liger": Provider(partial(_each, _liger), package="liger_kernel"),
    "flash-linear-attention": Provider(partial(_each, _fla), package="fla"),
    OURS: Provider(_ours),
    FUSED: Provider(partial(_ours, fuse_residual=True)),
    RECOMPUTED: Provider(partial(_ours, fuse_residual=True), triton_rmsnorm.recompute_norms),
}


class Counted(NamedTuple):
    """What was counted of one layer with the norms of one provider."""

    counts: Counts
    computed: int  # norms of the layer that are the provider's; the others are Hugging Face's
    norms: int


def rows(name: str, tokens: int, dtype: str) -> list[dict]:
    """One row per provider: its counts, or the reason why there are none.

    Args:
        name: one of MODELS, or any type of transformers, which is counted in its default configuration.
    """
    model = MODELS.get(name) or Model(name, {})
    found = []
    for provider, equipped in PROVIDERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peers, about the absence of a GPU
                counted = count_layer(model, equipped, tokens, DTYPES[dtype])
            row = {"norms": counted.norms, "computed": counted.computed, **counted.counts.as_row()}
        except UncountableError as error:
            row = {"reason": str(error)}
        except Exception as error:
            if name in MODELS:
                raise
            row = {"reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}  # such as a model that takes other input than text
        found.append({"model": name, "provider": provider, **row})
    return found


def count_layer(model: Model, provider: Provider, tokens: int, dtype: torch.dtype) -> Counted:
    """Counts the first decoder layer of a model.

    Raises:
        UncountableError: the model cannot run without values, or the provider is absent or has none of its norms.
    """
    if provider.package is not None and find_spec(provider.package) is None:
        raise UncountableError("not installed")
    built, layer = _build(model, dtype)
    norms = [(module, verdict.norm) for module in layer.modules() if (verdict := recognize(module)) and verdict.norm]
    if not norms:
        raise UncountableError("no RMS norm is recognized in its first layer")
    computed = provider.equip(built, norms)
    if computed == 0:
        raise UncountableError("has none of these norms")
    hidden = torch.empty(1, tokens, built.config.get_text_config().hidden_size, dtype=dtype, device="meta", requires_grad=True)
    modeling = importlib.import_module(type(built).__module__)
    left_out = mock.patch.object(modeling, model.uncounted, _free) if model.uncounted else nullcontext()
    with _as_on_gpu(provider.package), left_out:
        counts = count(built, layer, {module for module, _ in norms}, {"inputs_embeds": hidden}, provider.context)
    return Counted(counts, min(computed, len(norms)), len(norms))


def _build(model: Model, dtype: torch.dtype) -> tuple[PreTrainedModel, nn.Module]:
    """A model of one layer, and that layer."""
    default: PreTrainedConfig = CONFIG_MAPPING[model.model_type]().get_text_config()
    fields = {"num_hidden_layers": 1, "use_cache": False, **model.config}
    if "layer_types" not in fields and getattr(default, "layer_types", None):
        fields["layer_types"] = default.layer_types[:1]
    ALL_ATTENTION_FUNCTIONS.register("counted", _attention)
    with torch.device("meta"):
        built = AutoModel.from_config(type(default)(**fields), dtype=dtype, attn_implementation="counted").train()
    for module in built.modules():
        if isinstance(module, nn.ModuleList) and len(module) == 1:
            return built, module[0]
    raise UncountableError("its layers are not found")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by torch's flash operator, one launch each way, whatever the window."""
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)[0]
    return output.transpose(1, 2), None


class _Free(torch.autograd.Function):
    """A value with the gradients of all that it depends on, for nothing."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return torch.empty_like(tensors[2])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


def _free(query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _Free.apply(query, key, value, g, beta), None
