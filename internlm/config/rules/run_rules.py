"""Rules about the model and the run: shapes, learning rate, loss scale, checkpoints, alerts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from internlm.config.families import FAMILIES
from internlm.config.rules.rule import DEVICE_TYPE, Rule, RunInfo, at, divisors, listed
from internlm.config.schema import Config
from internlm.config.schema.fields import floor_share, is_remote
from internlm.utils.errors import Problem
from internlm.utils.secrets import is_web_address, mask_credentials, mask_url


# -- model ------------------------------------------------------------------------------------------------------------
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
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        message = f"low_freq_factor = {scaling.low_freq_factor} is not less than high_freq_factor"
        yield Problem("model.rope_scaling", f"{message} = {scaling.high_freq_factor}", "Change one of the two")


def windows_have_a_width(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that a sliding window has a width."""
    has_windows, width = config.model.use_sliding_window, config.model.sliding_window
    if has_windows and width is None:
        message = "True, but model.sliding_window is not given"
        yield Problem("model.use_sliding_window", message, "Set model.sliding_window, or use_sliding_window=False")


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


def attention_kernel_serves(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that an attention kernel chosen by name supports the device and the dtype."""
    backend, dtype, device = config.model.attention_backend, config.model.dtype, run.device_type
    on_host, dtypes = ATTENTION_NEEDS.get(backend, (device == "cpu", (dtype,)))
    if on_host != (device == "cpu") or dtype not in dtypes:
        where = "the CPU" if on_host else "a CUDA device"
        message = f"{backend!r} requires {where} and {' or '.join(map(str, dtypes))}, got {device} and {dtype}"
        yield Problem("model.attention_backend", message, "Set it to 'auto'")


def type_has_files(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that data of Megatron-LM have a folder: only ``tokenized`` stands for random data without one."""
    if config.data.train_folder is None and config.data.type == "megatron":
        todo = "Set it to the prefix of an .idx and .bin file, or to a folder of them"
        yield Problem("data.train_folder", "missing, but data.type is 'megatron'", todo)


def remote_data_is_cached(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that data at an address are token files, and have a folder for copies."""
    data = config.data
    cache_folder, streams = data.cache_folder, data.type == "streaming"
    for name, folder in (("train_folder", data.train_folder), ("valid_folder", data.valid_folder)):
        if not is_remote(folder or ""):
            continue
        address = mask_credentials(folder or "")
        if streams:
            todo = "Copy it to a local folder, or tokenize it with `internlm tokenize`"
            yield Problem(f"data.{name}", f"{address!r} is not local, but data.type is 'streaming'", todo)
        elif cache_folder is None:
            todo = "Set it to a local folder, for copies of the files"
            yield Problem("data.cache_folder", f"missing, but data.{name} is {address!r}", todo)
            return


# -- optimizer, checkpoints, alerts ------------------------------------------------------------------------------------
def schedule_fits_run(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that ``init_steps``, warm-up and, for ``wsd``, decay fit into ``total_steps``."""
    schedule, total = config.lr_scheduler, config.lr_scheduler.total_steps or 0
    ratios = {"warmup_ratio": schedule.warmup_ratio, "decay_ratio": schedule.decay_ratio}
    if schedule.type != "wsd":
        del ratios["decay_ratio"]
    # Rounded as the schedule itself rounds.
    steps = [schedule.init_steps, *(floor_share(ratio, total) for ratio in ratios.values())]
    if sum(steps) > total:
        terms = " + ".join(["init_steps", *(f"{name} · total_steps" for name in ratios)])
        message = f"{terms} = {' + '.join(map(str, steps))} steps is more than total_steps = {total}"
        yield Problem("lr_scheduler", message, f"Lower {' or '.join(['init_steps', *ratios])}")


def loss_scale_keeps_its_bounds(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the initial loss scale of a float16 run is between its smallest and largest value."""
    scaler, dtype = config.grad_scaler, config.model.dtype
    smallest, first, largest = scaler.fp16.min_scale, scaler.fp16.initial_scale, scaler.max_scale
    # bfloat16 has the exponent range of float32 and needs no loss scale.
    if dtype == "torch.float16" and not smallest <= first <= largest:
        message = f"fp16.initial_scale = {first} is not between fp16.min_scale = {smallest} and max_scale = {largest}"
        todo = f"Set grad_scaler.fp16.initial_scale to a value in [{smallest}, {largest}]"
        yield Problem("grad_scaler", message, todo)


def patterns_compile(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the patterns of parameter groups are valid regular expressions."""
    given = [dict(group).get("pattern") for group in config.optimizer.param_groups]
    # Groups that failed validation are still plain dicts here, in which a pattern may be missing or no string.
    for pattern in [pattern for pattern in given if isinstance(pattern, str)]:
        try:
            re.compile(pattern)
        except re.error as error:
            message = f"{error.pattern!r} is not a valid regular expression ({error})"
            yield Problem("optimizer.param_groups", message, "Escape special characters, such as \\( for a parenthesis")


def gradients_fit(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that gradients are not reduced in float16 without a loss scale: small ones would underflow."""
    dtype = config.model.dtype
    if config.reduce_comm_dtype == "torch.float16" and dtype != "torch.float16":
        message = f"torch.float16, but model.dtype = {dtype} has no loss scale, so small gradients would underflow"
        yield Problem("reduce_comm_dtype", message, "Use torch.bfloat16, or remove the key")


def saving_knows_where_and_when(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that a folder and an interval are given if checkpoints are saved."""
    ckpt, message = config.ckpt, "missing, but ckpt.enable_save_ckpt is True"
    if ckpt.enable_save_ckpt and not ckpt.save_ckpt_folder:
        yield Problem("ckpt.save_ckpt_folder", message, "Set it to a folder")
    if ckpt.enable_save_ckpt and ckpt.checkpoint_every is None:
        yield Problem("ckpt.checkpoint_every", message, "Set it to a number of steps")


def folders_of_other_formats_are_local_models(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that folders of other formats are on a file system, and that only the model is loaded from one."""
    info, ckpt = config.ckpt.load_ckpt_info, config.ckpt
    if info is not None and info.ckpt_type != "internevo":
        if tuple(info.content) != ("model",):
            message = f"{info.content}, but a folder of type {info.ckpt_type!r} holds only the model"
            yield Problem("ckpt.load_ckpt_info.content", message, "Set it to ('model',)")
        if is_remote(info.path):
            message = "names an object store, where folders of other formats cannot be read"
            yield Problem("ckpt.load_ckpt_info.path", message, "Copy the folder to a file system")
    if ckpt.enable_internevo2hf_ckpt and is_remote(ckpt.save_ckpt_folder or ""):
        message = "True, but ckpt.save_ckpt_folder names an object store, where no Hugging Face folder can be written"
        yield Problem("ckpt.enable_internevo2hf_ckpt", message, "Use internlm convert to-hf after the run")


def alerts_have_an_address(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the address of the webhook is an http or https URL, and is given if alerts are enabled."""
    alert, key = config.monitor.alert, "monitor.alert.feishu_alert_address"
    address, todo = alert.feishu_alert_address, "Set it to the http or https URL of a webhook"
    if address and not is_web_address(address):
        yield Problem(key, f"{mask_url(address)!r} is not an http or https URL", todo)
    if alert.enable_feishu_alert and not address:
        yield Problem(key, "missing, but monitor.alert.enable_feishu_alert is True", todo)


def job_name_is_a_folder_name(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that the job name is a valid folder name: the run writes to a folder of this name."""
    name = config.JOB_NAME
    # "." and ".." are folders too, a slash would lead to another folder, and control characters garble every log.
    if not name.strip(".") or set(name) & set("/\\") or not name.isprintable():
        yield Problem("JOB_NAME", f"{name!r} is not a valid folder name", "Use letters, digits, '-' and '_'")


HALF = ("torch.float16", "torch.bfloat16")
#: Whether an attention kernel runs on the CPU or on accelerators, and the values of ``model.dtype`` that it supports.
#: Kernels that support everything are left out. A test compares the table with ``internlm.ops``, which imports torch.
ATTENTION_NEEDS: dict[str, tuple[bool, tuple[str | None, ...]]] = {
    "flash": (False, HALF),
    "varlen": (False, HALF),
    "blocked": (True, ("torch.float32", "torch.tf32", "torch.float64")),
}

LOSS_SCALES = ("fp16.min_scale", "fp16.initial_scale", "max_scale")

RULES = (
    Rule(at("model", "hidden_size", "num_attention_heads", "head_dim"), heads_divide_hidden_size),
    Rule(at("model", "head_dim"), head_dim_is_even),
    Rule(at("model", "head_dim", "use_dynamic_ntk_rope"), dynamic_ntk_has_frequencies),
    Rule(at("model", "rope_scaling", "use_dynamic_ntk_rope", "rope_scaling_factor"), one_scaling_of_rotary_frequencies),
    Rule(at("model", "use_sliding_window", "sliding_window"), windows_have_a_width),
    Rule(("model_type", "model.lora"), adapters_have_a_family),
    Rule(at("model", "num_attention_heads", "num_kv_attention_heads"), kv_heads_divide_heads),
    Rule(at("model", "num_experts", "top_k"), experts_suffice),
    Rule(at("model", "cpu_offloading", "num_layers"), layers_to_offload_exist),
    Rule(at("model", "compile", "checkpoint"), compiled_blocks_are_recomputed_as_a_whole),
    Rule(at("model", "checkpoint", "lora"), attention_is_computed_once),
    Rule((*at("model", "attention_backend", "dtype"), DEVICE_TYPE), attention_kernel_serves),
    Rule(at("data", "type", "train_folder"), type_has_files),
    Rule(at("data", "type", "train_folder", "valid_folder", "cache_folder"), remote_data_is_cached),
    Rule(("JOB_NAME",), job_name_is_a_folder_name),
    Rule(at("lr_scheduler", "type", "total_steps", "init_steps", "warmup_ratio", "decay_ratio"), schedule_fits_run),
    Rule(("model.dtype", *at("grad_scaler", *LOSS_SCALES)), loss_scale_keeps_its_bounds),
    Rule(("optimizer.param_groups",), patterns_compile),
    Rule(("reduce_comm_dtype", "model.dtype"), gradients_fit),
    Rule(at("ckpt", "enable_save_ckpt", "save_ckpt_folder", "checkpoint_every"), saving_knows_where_and_when),
    Rule(at("ckpt", "load_ckpt_info", "enable_internevo2hf_ckpt"), folders_of_other_formats_are_local_models),
    Rule(at("monitor.alert", "enable_feishu_alert", "feishu_alert_address"), alerts_have_an_address),
)
