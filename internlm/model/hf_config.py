"""Configs of decoders as ``config.json`` of Hugging Face, and back.

A format is a row of :data:`FORMATS`: an architecture that ``transformers`` and inference servers know. Families that
they do not know are written as the one whose formula is the same.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from internlm.config.families import FAMILIES
from internlm.config.schema import ModelConfig
from internlm.model.spec import DecoderSpec
from internlm.utils.errors import Problem

#: Keys that both have, by our name.
SAME = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_attention_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True, kw_only=True)
class HFFormat:
    """Architecture of Hugging Face: its names, and what its config can express."""

    model_type: str
    architecture: str
    family: str
    """Model type that its checkpoints are read as."""
    biases: tuple[str, ...] = ()
    """Biases that ``attention_bias`` switches on together; the format has no others but :attr:`always`."""
    always: tuple[str, ...] = ()
    """Biases that the architecture always has."""
    mlp_bias: bool = False
    """Whether the config has the key ``mlp_bias``."""
    is_only_read: bool = False
    """Whether folders are read, while models of the family are written as Llama."""
    bias_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys that switch biases, where they are not ``attention_bias`` and ``mlp_bias``, by ours."""
    windows: str = ""
    """How sliding windows are expressed: ``all`` layers by ``sliding_window``; ``types``, by ``layer_types``."""
    activation_key: str = "hidden_act"


_QKVO = ("qkv_bias", "o_bias")
FORMATS = {
    row.model_type: row
    for row in (
        HFFormat(model_type="llama", architecture="LlamaForCausalLM", family="LLAMA2", biases=_QKVO, mlp_bias=True),
        HFFormat(model_type="mistral", architecture="MistralForCausalLM", family="MISTRAL", windows="all"),
        HFFormat(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            family="QWEN2",
            always=("qkv_bias",),
            windows="types",
        ),
        HFFormat(model_type="qwen3", architecture="Qwen3ForCausalLM", family="QWEN3", biases=_QKVO, windows="types"),
        HFFormat(model_type="olmo2", architecture="Olmo2ForCausalLM", family="OLMO2", biases=_QKVO),
        HFFormat(model_type="gemma", architecture="GemmaForCausalLM", family="GEMMA", biases=_QKVO),
        HFFormat(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            family="GEMMA3",
            biases=_QKVO,
            windows="types",
            activation_key="hidden_activation",
        ),
        # Releases with code of their own, which transformers has not.
        HFFormat(
            model_type="internlm",
            architecture="InternLMForCausalLM",
            family="INTERNLM",
            is_only_read=True,
            bias_keys=dict.fromkeys(_QKVO, "bias"),
        ),
        HFFormat(
            model_type="internlm2",
            architecture="InternLM2ForCausalLM",
            family="INTERNLM2",
            is_only_read=True,
            bias_keys=dict.fromkeys(_QKVO, "bias"),
        ),
        HFFormat(
            model_type="internlm3",
            architecture="InternLM3ForCausalLM",
            family="INTERNLM3",
            is_only_read=True,
            bias_keys={"qkv_bias": "qkv_bias", "o_bias": "bias", "mlp_bias": "bias"},
        ),
        HFFormat(model_type="baichuan", architecture="BaichuanForCausalLM", family="BAICHUAN2", is_only_read=True),
    )
}
#: Formats of the families; those that Hugging Face does not have are written as Llama.
FORMAT_OF = {
    **dict.fromkeys(FAMILIES, "llama"),
    **{row.family: name for name, row in FORMATS.items() if name != "llama" and not row.is_only_read},
}


def to_hf_config(model_type: str, spec: DecoderSpec) -> dict[str, Any]:
    """Return the content of ``config.json`` for a decoder of the built-in family ``model_type``."""
    row, c = FORMATS[FORMAT_OF[model_type]], spec.config
    config: dict[str, Any] = {
        "architectures": [row.architecture],
        "model_type": row.model_type,
        **{theirs: getattr(c, ours) for ours, theirs in SAME.items()},
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.intermediate_size,
        row.activation_key: ACTIVATIONS[c.activation],
        **_rope(row, spec),
    }
    if row.biases:
        config["attention_bias"] = spec.qkv_bias
    if row.mlp_bias:
        config["mlp_bias"] = spec.mlp_bias
    if row.windows == "all":
        config["sliding_window"] = c.sliding_window if c.use_sliding_window else None
    elif row.windows:
        windows = [c.window(layer) for layer in range(c.num_layers)]
        config["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        config["sliding_window"] = c.sliding_window
        config["use_sliding_window"] = c.use_sliding_window
    if row.model_type == "gemma3_text":
        config["query_pre_attn_scalar"] = c.head_size if c.attention_scale is None else round(c.attention_scale**-2)
    return config


def _rope(row: HFFormat, spec: DecoderSpec) -> dict[str, Any]:
    """Return the keys of the rotary embedding, which older versions of ``transformers`` read too."""
    c, scaling = spec.config, None
    if c.rope_scaling is not None:
        given = c.rope_scaling
        names = ("low_freq_factor", "high_freq_factor") if given.type == "llama3" else ("beta_fast", "beta_slow")
        scaling = {
            "rope_type": given.type,
            "factor": given.factor,
            "original_max_position_embeddings": given.original_max_position,
            **{name: getattr(given, name) for name in names},
        }
        if given.attention_factor is not None:
            scaling["attention_factor"] = given.attention_factor
    elif c.use_dynamic_ntk_rope:
        scaling = {"rope_type": "dynamic", "factor": c.rope_scaling_factor}
    elif c.rope_scaling_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": c.rope_scaling_factor}
    # The two keys of transformers before version 5, which later versions and inference servers still read.
    keys: dict[str, Any] = {"rope_theta": c.rope_base, "rope_scaling": scaling}
    if row.model_type == "gemma3_text":
        keys["rope_local_base_freq"] = c.local_rope_base or c.rope_base
    return keys


def unsupported_by(model_type: str, spec: DecoderSpec) -> Iterator[Problem]:
    """Yield a problem for each setting of a decoder that the Hugging Face format of its family cannot express."""
    row, c, standard = FORMATS[FORMAT_OF[model_type]], spec.config, FAMILIES[FORMATS[FORMAT_OF[model_type]].family]
    # A key of theirs switches several biases, so that only some combinations exist.
    biases = {"qkv_bias": spec.qkv_bias, "o_bias": spec.o_bias}
    allowed = [{key: key in row.always for key in biases}]
    if row.biases:
        allowed.append({key: key in (*row.always, *row.biases) for key in biases})
    found: dict[str, tuple[Any, bool]] = {
        "norm_type": (c.norm_type, c.norm_type != "rmsnorm"),
        "apply_post_layer_norm": (c.apply_post_layer_norm, c.apply_post_layer_norm),
        "qkv_bias": (f"{spec.qkv_bias} with o_bias = {spec.o_bias}", biases not in allowed),
        "mlp_bias": (spec.mlp_bias, spec.mlp_bias and not row.mlp_bias),
        "qk_norm": (c.qk_norm, c.qk_norm != standard.keys.get("qk_norm", "none")),
        "use_sliding_window": (c.use_sliding_window, c.use_sliding_window and not row.windows),
        "norm_head": (f"{c.norm_head} with tie_word_embeddings = True", c.norm_head and c.tie_word_embeddings),
        "global_layers": (c.global_layers, bool(c.global_layers) and row.windows != "types"),
        "attention_scale": (c.attention_scale, not _has_scale(row, c)),
        "local_rope_base": (c.local_rope_base, c.local_rope_base is not None and row.model_type != "gemma3_text"),
    }
    for key, (value, is_refused) in found.items():
        if is_refused:
            message = f"{value!r} cannot be expressed by {row.architecture}"
            yield Problem(f"model.{key}", message, "Export another model, or keep the checkpoint as it is")


def _has_scale(row: HFFormat, c: ModelConfig) -> bool:
    """Return whether a format can express the scale of attention: Gemma 3 the inverse root of any integer."""
    if c.attention_scale is None:
        return True
    return row.model_type == "gemma3_text" and math.isclose(round(c.attention_scale**-2) ** -0.5, c.attention_scale)


def from_hf_config(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return model type and keys of the ``model`` section for the content of a ``config.json``.

    Raises:
        ValueError: The architecture, or a setting, has no counterpart here.
    """
    row = _format_of(config)
    _check(config)
    keys = {ours: config[theirs] for ours, theirs in SAME.items() if config.get(theirs) is not None}
    keys["layer_norm_epsilon"] = float(config["rms_norm_eps"])
    keys |= feed_forward_keys(config["hidden_size"], config["intermediate_size"])
    by_theirs = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    activation = config.get(row.activation_key, ACTIVATIONS[FAMILIES[row.family].keys.get("activation", "silu")])
    if row.model_type == "gemma":
        # The first releases of Gemma say so, and mean the approximation by tanh.
        by_theirs["gelu"] = "gelu_tanh"
    if not isinstance(activation, str) or activation not in by_theirs:
        raise ValueError(f"{row.activation_key}: {reprlib.repr(activation)} is not one of {', '.join(by_theirs)}")
    keys["activation"] = by_theirs[activation]
    switches = {**dict.fromkeys(row.biases, "attention_bias"), **({"mlp_bias": "mlp_bias"} if row.mlp_bias else {})}
    switches |= row.bias_keys
    for bias in (*_QKVO, "mlp_bias"):
        keys[bias] = bias in row.always or (bias in switches and bool(config.get(switches[bias])))
    if row.model_type == "baichuan" and config.get("max_position_embeddings") is None:
        raise ValueError("max_position_embeddings: is missing, as in releases with ALiBi, which no model here has")
    return row.family, keys | _from_rope(row, config) | _from_windows(row, config)


def _format_of(config: Mapping[str, Any]) -> HFFormat:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    row = FORMATS.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise ValueError(f"model_type: {reprlib.repr(model_type)} is not one of {', '.join(FORMATS)}")
    if architectures is not None and architectures != [row.architecture]:
        raise ValueError(f"architectures: expected [{row.architecture!r}], got {reprlib.repr(architectures)}")
    return row


#: Keys that a decoder here does not have, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "attention_dropout": (None, 0, 0.0),
}
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
#: Largest number of layers: lists with an entry for each are built before the model section is checked.
_MOST_LAYERS = 10_000
_COUNTS_OR_NONE = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "max_window_layers")
_FLAGS_OR_NONE = ("tie_word_embeddings", "attention_bias", "mlp_bias", "bias", "qkv_bias", "use_sliding_window")


def _check(config: Mapping[str, Any]) -> None:
    """Check the types of values that are used, and that no setting is lost.

    Raises:
        ValueError: A value is missing or wrong, or has no counterpart.
    """
    for key in (*_COUNTS, *_COUNTS_OR_NONE):
        value = config.get(key)
        least = 0 if key == "max_window_layers" else 1
        if (value is not None or key in _COUNTS) and not (type(value) is int and least <= value < 1 << 40):
            raise ValueError(f"{key}: expected an integer of at least {least}, got {reprlib.repr(value)}")
    if config["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers: must be at most {_MOST_LAYERS}, got {config['num_hidden_layers']}")
    for key in _FLAGS_OR_NONE:
        if not (config.get(key) is None or isinstance(config[key], bool)):
            raise ValueError(f"{key}: expected true or false, got {reprlib.repr(config[key])}")
    _number(config, "rms_norm_eps")
    # A setting that is ignored would silently give another model.
    for key, values in _NEUTRAL.items():
        for section in (config, config.get("rope_parameters"), config.get("rope_scaling")):
            if isinstance(section, Mapping) and section.get(key) not in values:
                raise ValueError(f"{key}: {reprlib.repr(section[key])} has no counterpart here")
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if types is not None and not (isinstance(types, list) and len(types) == layers and all(t in known for t in types)):
        raise ValueError(f"layer_types: expected {layers} of {' and '.join(known)}, got {reprlib.repr(types)}")


def _number(section: Mapping[str, Any], key: str) -> float:
    """Return a positive number of a section.

    Raises:
        ValueError: It is missing, or something else.
    """
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}: expected a positive number, got {reprlib.repr(value)}")
    return float(value)


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if not (value is None or isinstance(value, dict)):
        raise ValueError(f"{key}: expected an object, got {reprlib.repr(value)}")
    return dict(value or {})


def feed_forward_keys(hidden: int, intermediate: int) -> dict[str, Any]:
    """Return keys that give exactly this feed-forward width, which is a product rounded up to a multiple."""
    # The quotient is what a user would write, and mostly gives the width back.
    ratio = intermediate / hidden
    if int(hidden * ratio) != intermediate:
        ratio = (intermediate + 0.5) / hidden  # which is cut off
    return {"multiple_of": math.gcd(intermediate, 256), "mlp_ratio": ratio}


def _from_rope(row: HFFormat, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the rotary embedding, from those of any version of ``transformers``."""
    rope = _section(config, "rope_parameters")
    local = {}
    if "full_attention" in rope:  # one dict for each type of layer
        of_windows, rope = _section(rope, "sliding_attention"), _section(rope, "full_attention")
        if "rope_theta" in of_windows:
            local = {"local_rope_base": _number(of_windows, "rope_theta")}
        if of_windows.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type of sliding_attention: {reprlib.repr(of_windows['rope_type'])} is not 'default'"
            )
    elif config.get("rope_local_base_freq") is not None:
        local = {"local_rope_base": _number(config, "rope_local_base_freq")}
    if row.model_type != "gemma3_text":
        local = {}
    if own := _section(config, "rotary"):  # InternLM's first releases
        kind = own.get("type", "origin")
        rope |= {"rope_type": "default" if kind == "origin" else kind, "factor": own.get("scaling_factor", 1.0)}
        rope |= {"rope_theta": own["base"]} if "base" in own else {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **_section(config, "rope_scaling"), **rope}
    keys: dict[str, Any] = {"rope_base": _number(rope, "rope_theta"), **local}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "dynamic"):
        return keys | {"rope_scaling_factor": _number(rope, "factor"), "use_dynamic_ntk_rope": kind == "dynamic"}
    if kind in ("llama3", "yarn"):
        known = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        has_length = rope.get("original_max_position_embeddings") is not None
        original = _number(
            *((rope, "original_max_position_embeddings") if has_length else (config, "max_position_embeddings"))
        )
        scaling = {name: _number(rope, name) for name in known if rope.get(name) is not None}
        return keys | {"rope_scaling": {"type": kind, "original_max_position": int(original), **scaling}}
    if kind != "default":
        raise ValueError(f"rope_type: {reprlib.repr(kind)} is not one of default, linear, dynamic, llama3, yarn")
    return keys


def _from_windows(row: HFFormat, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of sliding windows, and of the scale of attention."""
    keys: dict[str, Any] = {}
    if row.model_type == "gemma3_text" and config.get("query_pre_attn_scalar") is not None:
        keys["attention_scale"] = _number(config, "query_pre_attn_scalar") ** -0.5
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if not row.windows or window is None or config.get("use_sliding_window") is False:
        return keys | {"use_sliding_window": False}
    # Configs that were saved before this key existed say it by a rule of their architecture.
    types = config.get("layer_types")
    is_global = [kind == "full_attention" for kind in types] if types else _global_by_rule(row, config, layers)
    keys |= {"use_sliding_window": not all(is_global), "sliding_window": window}
    return keys | {"global_layers": tuple(layer for layer, is_whole in enumerate(is_global) if is_whole)}


def _global_by_rule(row: HFFormat, config: Mapping[str, Any], layers: int) -> list[bool]:
    """Return for each layer whether it attends to all tokens, in configs without ``layer_types``."""
    if row.model_type == "gemma3_text":
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        if type(every) is not int or every < 1:
            raise ValueError(f"sliding_window_pattern: expected an integer of at least 1, got {reprlib.repr(every)}")
        return [(layer + 1) % every == 0 for layer in range(layers)]
    if row.windows == "all":
        return [False] * layers
    first = config.get("max_window_layers")
    return [layer < (layers if first is None else first) for layer in range(layers)]
