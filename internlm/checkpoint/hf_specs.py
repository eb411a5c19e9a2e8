"""Specifications of decoders, from a ``config.json`` or a resolved config, and how two of them differ."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from internlm.checkpoint.hf_folder import ModelFolder
from internlm.config.families import FAMILIES
from internlm.config.schema import ModelConfig
from internlm.model.families import spec_of
from internlm.model.hf_config import from_hf_config
from internlm.model.registry import is_built_in, model_initializer
from internlm.model.spec import DecoderSpec
from internlm.utils.errors import CheckpointError, Problem

_OTHER = "Choose another folder"


class NamedSpec(NamedTuple):
    """Decoder of a built-in family."""

    model_type: str
    spec: DecoderSpec
    keys: dict[str, Any]
    """Keys of the ``model`` section that were given."""


def spec_of_folder(folder: ModelFolder) -> NamedSpec:
    """Return the decoder that a Hugging Face folder's config describes.

    Raises:
        CheckpointError: It has no counterpart here, or a value is missing or wrong.
    """
    file = folder.config_file
    try:
        model_type, keys = from_hf_config(folder.config)
    except ValueError as error:
        raise CheckpointError(Problem(file, str(error), _OTHER)) from None
    return NamedSpec(model_type, _spec(model_type, keys, file, _OTHER), keys)


def spec_of_config(config: Mapping[str, Any], where: str) -> NamedSpec:
    """Return the decoder of a resolved config, which an earlier version may have saved.

    Args:
        config: The config as a nested dict.
        where: What it is the config of, for errors.

    Raises:
        CheckpointError: The model is not of a built-in family, or a value is wrong.
    """
    model_type, model = config.get("model_type"), config.get("model")
    # A script may have registered its own model under a built-in name, whose tensors are then others.
    is_own = isinstance(model_type, str) and model_type in model_initializer and not is_built_in(model_type)
    if not isinstance(model_type, str) or model_type not in FAMILIES or is_own or not isinstance(model, dict):
        message = f"{reprlib.repr(model_type)} is not a built-in model type, of which alone the tensors are known"
        raise CheckpointError(Problem(f"{where}: model_type", message, "Export another model"))
    # Keys of other versions are left out: they cannot change the names and shapes of tensors, which are compared.
    keys = {key: value for key, value in model.items() if key in ModelConfig.model_fields}
    return NamedSpec(model_type, _spec(model_type, keys, where, "Pass --config with the config of the run"), keys)


def _spec(model_type: str, keys: Mapping[str, Any], where: str, todo: str) -> DecoderSpec:
    try:
        # As JSON, in which a list is a tuple.
        model = ModelConfig.model_validate_json(json.dumps(keys))
    except (ValidationError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise CheckpointError(Problem(where, str(error), todo)) from None
        details = error.errors(include_url=False)
        problems = [
            Problem(
                f"{where}: model.{'.'.join(map(str, detail['loc']))}",
                f"{detail['msg']}, got {reprlib.repr(detail['input'])}",
                todo,
            )
            for detail in details
        ]
        raise CheckpointError(*problems) from None
    if problem := _impossible(model):
        raise CheckpointError(Problem(where, problem, todo))
    return spec_of(FAMILIES[model_type], model)


def _impossible(model: ModelConfig) -> str:
    """Return why no decoder has these sizes, or an empty string."""
    # As the rules of configs say it, which need the other sections too.
    if model.num_attention_heads % model.kv_heads:
        return f"{model.num_attention_heads} heads are not divisible by {model.kv_heads} kv heads"
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        return f"hidden size {model.hidden_size} is not divisible by {model.num_attention_heads} heads"
    return f"head dimension {model.head_size} is not even" if model.head_size % 2 else ""


# -- differences ------------------------------------------------------------------------------------------------------

_Value = Callable[[DecoderSpec], Any]


def _of_config(name: str) -> _Value:
    return lambda spec: getattr(spec.config, name)


def _of_family(name: str) -> _Value:
    return lambda spec: getattr(spec.family, name)


#: What decides the shapes and names of tensors, by the key that a user sets.
SHAPES: dict[str, _Value] = {
    **{
        f"model.{name}": _of_config(name) for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    },
    "model.num_kv_attention_heads": _of_config("kv_heads"),
    "model.head_dim": _of_config("head_size"),
    "model.mlp_ratio (feed-forward width)": _of_config("intermediate_size"),
    "model.tie_word_embeddings": _of_config("tie_word_embeddings"),
    "model.qk_norm": _of_config("qk_norm"),
    "model.qkv_bias": lambda spec: spec.qkv_bias,
    "model.o_bias": lambda spec: spec.o_bias,
    "model.mlp_bias": lambda spec: spec.mlp_bias,
    "model.norm_type": _of_config("norm_type"),
    "model.apply_post_layer_norm": _of_config("apply_post_layer_norm"),
    "model_type (where a block normalises)": _of_family("norms"),
}
#: What else decides the values that a model computes from the same tensors.
MATHEMATICS: dict[str, _Value] = {
    "model_type (offset of the weights of norms)": _of_family("norm_offset"),
    "model_type (factor of embeddings)": lambda spec: spec.embedding_scale,
    **{f"model.{name}": _of_config(name) for name in ("layer_norm_epsilon", "activation", "norm_head")},
    "model.rope_base, rope_scaling or their neighbours": lambda spec: _without_unused_length(spec),
    "model.local_rope_base": lambda spec: _local_base(spec),
    "model.attention_scale": lambda spec: spec.config.attention_scale or spec.config.head_size**-0.5,
    "model.sliding_window (by layer)": lambda spec: [spec.config.window(n) for n in range(spec.config.num_layers)],
}


def _without_unused_length(spec: DecoderSpec) -> Any:
    """Return the rotary frequencies of global layers; the length that a model is designed for rarely decides them."""
    # Users often lengthen it for their own data, which changes nothing else.
    rotary = spec.rotary
    length = rotary.max_position if rotary.dynamic_ntk else None
    return (rotary.base, rotary.factor, rotary.dynamic_ntk, length, rotary.context)


def _local_base(spec: DecoderSpec) -> float | None:
    has_windows = any(spec.config.window(layer) for layer in range(spec.config.num_layers))
    return spec.local_rotary.base if has_windows else None


def differences(file: str, theirs: DecoderSpec, ours: DecoderSpec, allow_changes: bool = False) -> Iterator[Problem]:
    """Yield a problem for each difference between the decoder of a Hugging Face folder and that of a run.

    Args:
        file: File of its config, for errors.
        theirs: Decoder by its config.json.
        ours: Decoder of the run.
        allow_changes: Whether the run may compute other values from the same tensors.
    """
    rows = {**SHAPES, **({} if allow_changes else MATHEMATICS)}
    for key, value_of in rows.items():
        found, wanted = value_of(ours), value_of(theirs)
        if not _same(found, wanted):
            todo = "Use the value of the folder"
            if key in MATHEMATICS:
                todo += ", or set ckpt.allow_model_changes=True to load the weights into the changed model"
            message = f"{reprlib.repr(found)}, but {file} has {reprlib.repr(wanted)}"
            yield Problem(key, message, todo)


def _same(one: Any, other: Any) -> bool:
    # The scale of attention is a root in one config, and its square in the other.
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-12 * max(abs(one), abs(other))
    return bool(one == other)
