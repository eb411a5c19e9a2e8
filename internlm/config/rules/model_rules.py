"""Rules about the model: its shape, its kernels, and settings that contradict one another."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config import keys
from internlm.config.families import FAMILIES, is_replaced
from internlm.config.rules.rule import DEVICE_TYPE, Rule, RunInfo, at, divisors, listed
from internlm.config.schema import Config
from internlm.utils.errors import Problem


def heads_divide_hidden_size(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the hidden size is divisible by the number of heads, unless ``head_dim`` is given."""
    model = config.model
    # head_dim is None if it is not given and cannot be derived. A given head_dim need not divide the hidden size: Gemma
    # and Qwen3 have such models.
    if model.head_dim is None:
        message = f"{model.hidden_size} is not divisible by num_attention_heads = {model.num_attention_heads}"
        yield Problem("model.hidden_size", message, "Change one of the two, or set model.head_dim")


def head_dim_is_even(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``head_dim`` is even: rotary embedding rotates pairs of elements."""
    if (config.model.head_dim or 0) % 2:
        yield Problem(
            "model.head_dim",
            f"{config.model.head_dim} is odd, but rotary embedding rotates pairs of elements",
            "Use an even number",
        )


def dynamic_ntk_has_frequencies(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``head_dim`` is more than 2 for dynamic NTK scaling, whose exponent is head_dim / (head_dim - 2)."""
    if (config.model.use_dynamic_ntk_rope, config.model.head_dim) == (True, 2):
        message = "True requires model.head_dim of at least 4, got 2: a single frequency cannot be scaled"
        yield Problem("model.use_dynamic_ntk_rope", message, "Set it to False, or use wider heads")


def one_scaling_of_rotary_frequencies(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``rope_scaling`` has a transition, and excludes linear and dynamic scaling."""
    scaling, factor = config.model.rope_scaling, config.model.rope_scaling_factor
    is_scaled = config.model.use_dynamic_ntk_rope or factor != 1
    if scaling is not None and is_scaled:
        message = "is given beside use_dynamic_ntk_rope or rope_scaling_factor, which are other ways to do the same"
        yield Problem("model.rope_scaling", message, "Keep one of them")
    for less, more in TRANSITIONS if scaling is not None else ():
        if getattr(scaling, less) >= getattr(scaling, more):
            message = f"{less} = {getattr(scaling, less)} is not less than {more} = {getattr(scaling, more)}"
            yield Problem("model.rope_scaling", message, "Change one of the two")


def scaling_has_keys_of_its_type(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``rope_scaling`` sets no key of the other type, which would have no effect."""
    scaling = config.model.rope_scaling
    others = {name: of for of, names in KEYS_OF_SCALING.items() for name in names if scaling and of != scaling.type}
    for name, of in others.items():
        if getattr(scaling, name) != keys.fields()[f"model.rope_scaling.{name}"].default:
            message = f"{getattr(scaling, name)} is read by the type {of!r} only"
            yield Problem(f"model.rope_scaling.{name}", message, "Remove it, or change model.rope_scaling.type")


def yarn_has_wavelengths(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``rope_base`` is more than 1 for YaRN, which divides by its logarithm."""
    scaling, base = config.model.rope_scaling, config.model.rope_base
    if scaling is not None and scaling.type == "yarn" and base <= 1:
        message = f"{base} makes no frequency lower than another, which YaRN (model.rope_scaling) relies on"
        yield Problem("model.rope_base", message, "Use a base of more than 1, such as 10000")


def windows_have_a_width(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that a sliding window has a width."""
    has_windows, width = config.model.use_sliding_window, config.model.sliding_window
    if has_windows and width is None:
        message = "True, but model.sliding_window is not given"
        yield Problem("model.use_sliding_window", message, "Set model.sliding_window, or use_sliding_window=False")


def global_layers_exist(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``global_layers`` names layers of the model, each once."""
    indices, layers = list(config.model.global_layers or ()), config.model.num_layers
    if missing := sorted({index for index in indices if index >= layers}):
        message = f"the model has no layer {listed(missing)}: model.num_layers = {layers}"
        yield Problem("model.global_layers", message, f"Use indices from 0 to {layers - 1}")
    if repeated := sorted({index for index in indices if indices.count(index) > 1}):
        yield Problem("model.global_layers", f"names layer {listed(repeated)} more than once", "Name each layer once")


def modules_of_hugging_face_have_their_own_settings(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``model`` sets nothing that a module of Hugging Face would ignore, and ``hf`` only for such a module.

    What applies to any module is left: sizes, which costs follow from, and what is done around its blocks.
    """
    model, defaults = config.model, keys.fields()
    given = {f"model.{name}": getattr(model, name) for name in NOT_OF_HF_MODULES}
    given["use_fp32_norm"] = config.use_fp32_norm
    ignored = {key: value for key, value in given.items() if value != defaults[key].default}
    if model.checkpoint == "selective":  # which recomputes the attention of the built-in decoder
        ignored["model.checkpoint"] = model.checkpoint
    for key, value in ignored.items() if config.model_type == "hf" else ():
        message = f"{value!r} has no effect on the module of Hugging Face, which has its own settings"
        todo = "Use True, False or a fraction" if key == "model.checkpoint" else "Set model.hf.cfg_extra_kwargs instead"
        yield Problem(key, message, todo)
    if model.hf is not None and config.model_type in FAMILIES and not is_replaced(config.model_type):
        message = f"is given, but model_type = {config.model_type!r} is a family of its own"
        yield Problem("model.hf", message, "Remove it, or set model_type to 'hf'")


def adapters_have_a_family(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the model with adapters is of a built-in family: only its blocks have linears of these names."""
    lora, model_type = config.model.lora, config.model_type
    if lora is not None and model_type not in FAMILIES:
        message = f"is given, but the model type {model_type!r} is not a built-in family"
        todo = "Remove it, or build your model from internlm.core.parallel.lora.AdaptedLinear"
        yield Problem("model.lora", message, todo)


def kv_heads_divide_heads(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that each key/value head serves the same number of query heads."""
    heads, kv_heads = config.model.num_attention_heads, config.model.kv_heads
    if heads % kv_heads:
        message = f"num_attention_heads = {heads} is not divisible by {kv_heads}"
        yield Problem("model.num_kv_attention_heads", message, f"Use one of {listed(divisors(heads))}")


def experts_suffice(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``top_k`` is at most the number of experts."""
    experts, top_k = config.model.num_experts, config.model.top_k
    # A dense model has one expert and does not read top_k.
    if experts > 1 and top_k > experts:
        yield Problem("model.top_k", f"{top_k} is more than num_experts = {experts}", f"Use at most {experts}")


def layers_to_offload_exist(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``cpu_offloading`` is at most ``num_layers``.

    A model chunk may have fewer than ``cpu_offloading`` blocks; the activations of all its blocks are then offloaded.
    """
    offloaded, layers = config.model.cpu_offloading, config.model.num_layers
    if offloaded > layers:
        message = f"{offloaded} is more than num_layers = {layers}"
        yield Problem("model.cpu_offloading", message, f"Use at most {layers}")


def compiled_blocks_are_recomputed_as_a_whole(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``checkpoint`` is not ``selective`` for compiled blocks: the compiler chooses what they save."""
    if (config.model.compile, config.model.checkpoint) == (True, "selective"):
        message = "'selective' has no effect with model.compile = True: the compiler chooses the saved activations"
        yield Problem("model.checkpoint", message, "Use True, False or a fraction, or set model.compile to False")


def attention_is_computed_once(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``checkpoint`` is not ``selective`` beside an adapter of ``wo``: its input would be computed twice."""
    lora, checkpoint = config.model.lora, config.model.checkpoint
    if lora is not None and "wo" in lora.targets and checkpoint == "selective":
        message = "'selective' recomputes attention for wo, and again for its adapter"
        todo = "Use True, False or a fraction, or leave wo out of model.lora.targets"
        yield Problem("model.checkpoint", message, todo)


def flash_attention_is_allowed(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that no flash-attn kernel is chosen by name if ``use_flash_attn`` forbids them."""
    backend, allowed = config.model.attention_backend, config.model.use_flash_attn
    if backend in ("flash", "varlen") and not allowed:
        message = f"{backend!r} is a kernel of flash-attn, which model.use_flash_attn = False forbids"
        yield Problem("model.attention_backend", message, "Change one of the two")


def attention_kernel_serves(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that an attention kernel chosen by name supports the device and the dtype."""
    backend, dtype, device = config.model.attention_backend, config.model.dtype, run.device_type
    on_host, dtypes = ATTENTION_NEEDS.get(backend, (device == "cpu", (dtype,)))
    if on_host != (device == "cpu") or dtype not in dtypes:
        where = "the CPU" if on_host else "a CUDA device"
        message = f"{backend!r} requires {where} and {' or '.join(map(str, dtypes))}, got {device} and {dtype}"
        yield Problem("model.attention_backend", message, "Set it to 'auto'")


HALF = ("torch.float16", "torch.bfloat16")
#: Whether an attention kernel runs on the CPU or on accelerators, and the values of ``model.dtype`` that it supports.
#: Kernels that support everything are left out. A test compares the table with ``internlm.ops``, which imports torch.
ATTENTION_NEEDS: dict[str, tuple[bool, tuple[str | None, ...]]] = {
    "flash": (False, HALF),
    "varlen": (False, HALF),
    "blocked": (True, ("torch.float32", "torch.tf32", "torch.float64")),
}

#: Keys of ``rope_scaling`` whose first must be less than the second.
TRANSITIONS = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))
#: Keys of ``rope_scaling`` by the type that reads them.
KEYS_OF_SCALING = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
}
#: Keys of ``model`` that describe the built-in decoder, and do not reach a module of Hugging Face.
NOT_OF_HF_MODULES = (
    *("max_position_embeddings", "drop_rate", "norm_type", "layer_norm_epsilon", "apply_post_layer_norm", "qk_norm"),
    *("activation", "no_bias", "qkv_bias", "o_bias", "mlp_bias", "residual_in_fp32", "use_flash_attn"),
    *("attention_backend", "parallel_output", "embed_split_hidden", "embed_grad_scale", "tie_word_embeddings"),
    *("qk_interleaved", "rope_base", "use_dynamic_ntk_rope", "rope_scaling_factor", "rope_scaling", "local_rope_base"),
    *("attention_scale", "use_sliding_window", "sliding_window", "global_layers", "norm_head", "use_scaled_init"),
    *("embedding_init_std", "attn_wqkv_init_std", "attn_other_init_std", "ffn_uplayer_init_std"),
    *("ffn_other_init_std", "out_head_init_std", "mlp_layer_fusion", "enable_qkv_fusion"),
)

RULES = (
    Rule(at("model", "hidden_size", "num_attention_heads", "head_dim"), heads_divide_hidden_size),
    Rule(at("model", "head_dim"), head_dim_is_even),
    Rule(at("model", "head_dim", "use_dynamic_ntk_rope"), dynamic_ntk_has_frequencies),
    Rule(at("model", "rope_scaling", "use_dynamic_ntk_rope", "rope_scaling_factor"), one_scaling_of_rotary_frequencies),
    Rule(at("model", "rope_scaling"), scaling_has_keys_of_its_type),
    Rule(at("model", "rope_scaling", "rope_base"), yarn_has_wavelengths),
    Rule(at("model", "use_sliding_window", "sliding_window"), windows_have_a_width),
    Rule(at("model", "global_layers", "num_layers"), global_layers_exist),
    Rule(
        ("model_type", "use_fp32_norm", *at("model", "hf", "checkpoint", *NOT_OF_HF_MODULES)),
        modules_of_hugging_face_have_their_own_settings,
    ),
    Rule(("model_type", "model.lora"), adapters_have_a_family),
    Rule(at("model", "num_attention_heads", "num_kv_attention_heads"), kv_heads_divide_heads),
    Rule(at("model", "num_experts", "top_k"), experts_suffice),
    Rule(at("model", "cpu_offloading", "num_layers"), layers_to_offload_exist),
    Rule(at("model", "compile", "checkpoint"), compiled_blocks_are_recomputed_as_a_whole),
    Rule(at("model", "checkpoint", "lora"), attention_is_computed_once),
    Rule(at("model", "attention_backend", "use_flash_attn"), flash_attention_is_allowed),
    Rule((*at("model", "attention_backend", "dtype"), DEVICE_TYPE), attention_kernel_serves),
)
