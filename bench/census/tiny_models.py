"""Tiny random models of Hugging Face model types, from their own configurations with every size shrunk by what the field is called.

model = tiny_model("llama")
loss = model(**tiny_batch(model)).loss
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, LAYERS, MAX_LAYERS = 64, 4, 16, 96, 256, 2, 8

# Tokens may be bytes of text: the ids of special tokens are control characters that text does not have.
FIRST_BYTE_OF_TEXT = 32
_SPECIAL = [number for number in range(3, FIRST_BYTE_OF_TEXT) if chr(number) not in "\t\n\r"]

# Integer fields by name: the first pattern that is found decides. A number bounds the field.
_SIZES: list[tuple[str, int]] = [
    (r"vocab_size|vocabulary_size|num_embeddings$", VOCAB),
    (r"(key_value|kv)_heads?$|num_query_groups|n_head_kv|multi_query_group_num", 2),
    (r"heads?$|n_heads?_|heads?_num", HEADS),
    (r"experts_per_tok|experts_topk|num_selected|top_?k$|moe_k$|num_experts_per", 2),
    (r"n_group$|topk_group|expert_group", 1),
    (r"shared_experts?$|n_?groups$", 1),
    (r"experts?$", 4),
    (r"shared_layers$", 0),
    (r"(layers?|blocks|depth|hidden_groups|inner_group_num)$", LAYERS),
    (r"rope_head_dim|nope_head_dim", HEAD_DIM // 2),
    (r"(head_dim|d_head|kv_channels|d_kv|head_size)$|^head_dim", HEAD_DIM),
    (r"(rank|lora.*dim)$", 16),
    (r"intermediate|ffn|d_ff|mlp_dim|n_inner|mlp_hidden|feed_forward", INTERMEDIATE),
    (r"_per_layer_input$", 16),
    (r"num_filters$", 4),
    (r"(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embed_size|embedding_size|^dim|projection_dim|output_dim|width)$", HIDDEN),
    (r"max_position|n_positions|max_seq|n_ctx|max_(target|source)_pos|context_length", 256),
    (r"image_size$", 32),
    (r"patch_size$", 8),
]

# Of these, a default of None cannot be built.
_NEEDED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": HEAD_DIM, "vocab_size": VOCAB}

# Fields of types whose defaults do not fit together once they are small.
_FIELDS: dict[str, dict] = {
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN, "mamba_n_heads": 8, "mamba_d_head": HEAD_DIM, "mamba_rms_norm": True},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "step3p5": {"sliding_window": 8},
    "unlimited_ocr_text": {"num_key_value_heads": HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "linear_num_value_heads": HEADS,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": HEAD_DIM,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
    },
}

# Where a type is looked up for its model class: language models before bare ones.
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


def model_types() -> list[str]:
    """All model types of the installed transformers."""
    return list(CONFIG_MAPPING_NAMES)


def unknown(name: str) -> str:
    """Why `name` is no model type, if so."""
    if name in CONFIG_MAPPING_NAMES:
        return ""
    close = get_close_matches(name, CONFIG_MAPPING_NAMES) or ["llama", "t5"]
    return f"must be a model type of transformers, such as {' or '.join(close)}, got {name}"


def tiny_config(model_type: str | type[PreTrainedConfig], **fields) -> PreTrainedConfig:
    """The default configuration of a model type, or of a class, with every size shrunk; `fields` are set as they are."""
    return _shrunk(CONFIG_MAPPING[model_type] if isinstance(model_type, str) else model_type, fields)


def tiny_model(model_type: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A random float32 model of a model type, in training mode: its language model if it has one. The caller's random state is kept.

    Args:
        fields: of the configuration, in place of the shrunk ones.

    Raises:
        ValueError: there is no model class for the type. A model that does not fit its shrunk sizes raises what it raises.
    """
    config = tiny_config(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Grouped matrix products of experts do not exist in fp64.
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = model_class(model_type, config)._from_config(config, dtype=torch.float32, **eager)
        # The weights of norms start equal, which would hide an error in them.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def model_class(model_type: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of models, with a language head if there is one, that has this very class of configurations."""
    candidates = []
    for mapping in _MAPPINGS:
        names = getattr(modeling_auto, mapping, {}).get(model_type, ())
        names = (names,) if isinstance(names, str) else names
        candidates += [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    mapped = len(candidates)
    file = type(config).__module__.replace(".configuration_", ".modeling_")
    if find_spec(file):
        candidates += vars(importlib.import_module(file)).values()
    for cls in candidates:
        fits = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and getattr(cls, "config_class", None) is type(config)
        if fits and cls.forward is not torch.nn.Module.forward:
            return cls
    if mapped and not config.sub_configs:  # a type that borrows the model of another
        return candidates[0]
    raise ValueError(f"no model class has the configuration {type(config).__name__}")


def tiny_batch(model: PreTrainedModel, seed: int = 0, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Random input for `model`, on the CPU, with labels if it takes them; text, unless it takes only images, patches or sound."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    vocab = getattr(config.get_text_config(), "vocab_size", None)
    ids = torch.randint(FIRST_BYTE_OF_TEXT, vocab if isinstance(vocab, int) else VOCAB, (batch, length), generator=generator)
    inputs: dict = {"use_cache": False} if "use_cache" in accepted else {}
    if "input_ids" in accepted:
        inputs["input_ids"] = ids
        if "labels" in accepted:
            inputs["labels"] = ids
    elif "grid_thw" in accepted:  # a vision tower that takes patches: one image of 4 x 4
        size = config.patch_size**2 * getattr(config, "temporal_patch_size", 1) * getattr(config, "in_channels", 3)
        name = "hidden_states" if "hidden_states" in accepted else "pixel_values"
        inputs[name] = torch.randn(16, size, generator=generator)
        inputs["grid_thw"] = torch.tensor([[1, 4, 4]])
    elif "pixel_values" in accepted:
        size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 32
        inputs["pixel_values"] = torch.randn(batch, getattr(config, "num_channels", 3), size, size, generator=generator)
    elif "inputs_embeds" in accepted:
        inputs["inputs_embeds"] = torch.randn(batch, length, config.hidden_size, generator=generator)
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def _shrunk(config_class: type[PreTrainedConfig], fields: dict) -> PreTrainedConfig:
    default = vars(config_class())
    changed: dict = {}
    tokens = iter(_SPECIAL)
    for name, value in default.items():
        if name.startswith("_") and not name.endswith("_config"):
            continue
        if isinstance(value, PreTrainedConfig):
            changed[name] = _shrunk(type(value), {}).to_dict()
        elif re.search(r"token_(id|index|ids)$", name):
            changed[name] = _token(name, value, tokens)
        elif type(value) is int:
            changed[name] = _size(name, value)
        elif value is None and name in _NEEDED:
            changed[name] = _NEEDED[name]
    _make_consistent(config_class, default, changed)
    changed = {name: value for name, value in changed.items() if value != default.get(name)}
    if default.get("is_encoder_decoder") and default.get("decoder_start_token_id") is None:
        changed["decoder_start_token_id"] = 0  # what the labels are shifted by
    return config_class(**(changed | _FIELDS.get(config_class.model_type, {}) | fields))


def _size(name: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return min(value, size)
    return value


def _token(name: str, value, tokens: Iterator[int]):
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if isinstance(value, (list, tuple)):
        return [_token(name, one, tokens) for one in value]
    if type(value) is not int or value < 0:
        return value
    return fixed[name] if name in fixed else next(tokens)


def _make_consistent(config_class: type[PreTrainedConfig], default: dict, changed: dict) -> None:
    """Fields that have to fit one another, whatever the model."""
    types = default.get("layer_types")
    if isinstance(types, (list, tuple)) and "num_hidden_layers" in changed:
        # As many layers as show every type.
        changed["num_hidden_layers"] = min(MAX_LAYERS, max(LAYERS, *(types.index(one) + 1 for one in set(types))))
    if "kv_lora_rank" in default and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    if "qk_rope_head_dim" in default:
        changed.pop("head_dim", None)
    rope = default.get("rope_parameters")
    if rope and isinstance(rope, dict) and (rope.get("mrope_section") or "mrope_section" in _modeling_source(config_class)):
        factor = rope.get("partial_rotary_factor", default.get("partial_rotary_factor", 1.0))
        half = int(HEAD_DIM * factor) // 2
        changed["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    for heads, head_dim, expand in (("num_heads", "head_dim", "expand"), ("mamba_n_heads", "mamba_d_head", "mamba_expand")):
        if heads in changed and head_dim in changed and isinstance(default.get(expand), int):
            changed[heads] = HIDDEN * default[expand] // changed[head_dim]


def _modeling_source(config_class: type[PreTrainedConfig]) -> str:
    spec = find_spec(config_class.__module__.replace(".configuration_", ".modeling_"))
    return Path(spec.origin).read_text() if spec and spec.origin else ""
