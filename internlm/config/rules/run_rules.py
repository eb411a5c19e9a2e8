"""Rules about the run: folders of data, learning rate, loss scale, checkpoints, alerts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from internlm.config.rules.rule import Rule, RunInfo, at
from internlm.config.schema import Config
from internlm.config.schema.fields import floor_share, is_remote
from internlm.utils.errors import Problem
from internlm.utils.secrets import is_web_address, mask_credentials, mask_url


# -- data -------------------------------------------------------------------------------------------------------------
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


def folders_of_other_formats_hold_models(config: Config, run: RunInfo) -> Iterator[Problem]:
    """Check that only the model is loaded from a folder of another format, and that one of Meta is on a file system."""
    info = config.ckpt.load_ckpt_info
    if info is not None and info.ckpt_type != "internevo":
        if tuple(info.content) != ("model",):
            message = f"{info.content}, but a folder of type {info.ckpt_type!r} holds only the model"
            yield Problem("ckpt.load_ckpt_info.content", message, "Set it to ('model',)")
        if info.ckpt_type == "llama" and is_remote(info.path):
            message = "names an object store, where releases of Meta cannot be read"
            yield Problem("ckpt.load_ckpt_info.path", message, "Copy the folder to a file system")


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


LOSS_SCALES = ("fp16.min_scale", "fp16.initial_scale", "max_scale")

RULES = (
    Rule(at("data", "type", "train_folder"), type_has_files),
    Rule(at("data", "type", "train_folder", "valid_folder", "cache_folder"), remote_data_is_cached),
    Rule(("JOB_NAME",), job_name_is_a_folder_name),
    Rule(at("lr_scheduler", "type", "total_steps", "init_steps", "warmup_ratio", "decay_ratio"), schedule_fits_run),
    Rule(("model.dtype", *at("grad_scaler", *LOSS_SCALES)), loss_scale_keeps_its_bounds),
    Rule(("optimizer.param_groups",), patterns_compile),
    Rule(("reduce_comm_dtype", "model.dtype"), gradients_fit),
    Rule(at("ckpt", "enable_save_ckpt", "save_ckpt_folder", "checkpoint_every"), saving_knows_where_and_when),
    Rule(at("ckpt", "load_ckpt_info"), folders_of_other_formats_hold_models),
    Rule(at("monitor.alert", "enable_feishu_alert", "feishu_alert_address"), alerts_have_an_address),
)
