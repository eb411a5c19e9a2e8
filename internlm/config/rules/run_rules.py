"""Rules about the course of a run: data, learning rate, saving, alerts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from internlm.config.rules.rule import Rule, at
from internlm.config.schema import Config
from internlm.config.schema.fields import parse_rampup, parse_skip_batches
from internlm.config.support import Facts
from internlm.utils.errors import Problem


def skip_batches_parses(config: Config, facts: Facts) -> Iterator[Problem]:
    """Batch numbers and ranges of them."""
    try:
        parse_skip_batches(config.data.skip_batches)
    except ValueError as error:
        yield Problem("data.skip_batches", str(error), "Write it as in: '0-9,20', both ends included")


def rampup_leads_to_micro_num(config: Config, facts: Facts) -> Iterator[Problem]:
    """Three counts, of which the first is where the growth to ``micro_num`` starts."""
    data = config.data
    try:
        rampup = parse_rampup(data.rampup_batch_size)
    except ValueError as error:
        yield Problem(
            "data.rampup_batch_size", str(error), "Write it as in: '2 2 100', for 2 more every 100 steps from 2 on"
        )
        return
    if rampup and rampup.start > data.micro_num:
        what = f"starts at {rampup.start}, above data.micro_num = {data.micro_num}, to which it grows"
        yield Problem("data.rampup_batch_size", what, f"Start at {data.micro_num} or less")


def schedule_fits_run(config: Config, facts: Facts) -> Iterator[Problem]:
    """The learning rate must reach its peak, and that of wsd begin its decay there."""
    schedule, total = config.lr_scheduler, config.lr_scheduler.total_steps or 0
    ratios = {"warmup_ratio": schedule.warmup_ratio, "decay_ratio": schedule.decay_ratio}
    if schedule.type != "wsd":
        del ratios["decay_ratio"]
    steps = [schedule.init_steps, *(int(total * ratio) for ratio in ratios.values())]
    if sum(steps) > total:
        terms = " + ".join(["init_steps", *(f"{name} · total_steps" for name in ratios)])
        what = f"{terms} = {' + '.join(map(str, steps))} steps is longer than total_steps = {total}"
        yield Problem("lr_scheduler", what, f"Lower {' or '.join(['init_steps', *ratios])}")


def loss_scale_keeps_its_bounds(config: Config, facts: Facts) -> Iterator[Problem]:
    """It is used with float16 alone."""
    scaler, dtype = config.grad_scaler, config.model.dtype
    smallest, first, largest = scaler.fp16.min_scale, scaler.fp16.initial_scale, scaler.max_scale
    if dtype == "torch.float16" and not smallest <= first <= largest:
        what = f"fp16.initial_scale = {first} is not between fp16.min_scale = {smallest} and max_scale = {largest}"
        yield Problem("grad_scaler", what, "Change them until it is")


def patterns_compile(config: Config, facts: Facts) -> Iterator[Problem]:
    """Of parameter groups."""
    given = [dict(group).get("pattern") for group in config.optimizer.param_groups]
    for pattern in [each for each in given if isinstance(each, str)]:  # of all else the schema speaks
        try:
            re.compile(pattern)
        except re.error as error:
            yield Problem("optimizer.param_groups", f"{error.pattern!r} is no regular expression ({error})", "Mend it")


def gradients_fit(config: Config, facts: Facts) -> Iterator[Problem]:
    """Small gradients vanish in float16, unless a loss scale keeps them up."""
    dtype = config.model.dtype
    if config.reduce_comm_dtype == "torch.float16" and dtype != "torch.float16":
        what = f"torch.float16, but model.dtype = {dtype} has no loss scale, so small gradients would vanish"
        yield Problem("reduce_comm_dtype", what, "Use torch.bfloat16, or remove it")


def saving_knows_where_and_when(config: Config, facts: Facts) -> Iterator[Problem]:
    """Saving needs a folder and an interval."""
    ckpt = config.ckpt
    if ckpt.enable_save_ckpt and not ckpt.save_ckpt_folder:
        yield Problem("ckpt.save_ckpt_folder", "missing, but ckpt.enable_save_ckpt is True", "Give a folder")
    if ckpt.enable_save_ckpt and ckpt.checkpoint_every is None:
        yield Problem("ckpt.checkpoint_every", "missing, but ckpt.enable_save_ckpt is True", "Give a number of steps")


def alerts_have_an_address(config: Config, facts: Facts) -> Iterator[Problem]:
    """Alerts need someone to go to."""
    alert = config.monitor.alert
    if alert.enable_feishu_alert and not alert.feishu_alert_address:
        what = "missing, but monitor.alert.enable_feishu_alert is True"
        yield Problem("monitor.alert.feishu_alert_address", what, "Give the address of a webhook")


def job_name_is_a_folder_name(config: Config, facts: Facts) -> Iterator[Problem]:
    """Records lie in a folder of that name."""
    name = config.JOB_NAME
    if not name.strip(".") or set(name) & set("/\\\0"):
        yield Problem("JOB_NAME", f"{name!r} can't be the name of a folder", "Use letters, digits, '-' and '_'")


LOSS_SCALES = ("fp16.min_scale", "fp16.initial_scale", "max_scale")

RULES = (
    Rule(("JOB_NAME",), job_name_is_a_folder_name),
    Rule(at("data", "skip_batches"), skip_batches_parses),
    Rule(at("data", "rampup_batch_size", "micro_num"), rampup_leads_to_micro_num),
    Rule(at("lr_scheduler", "type", "total_steps", "init_steps", "warmup_ratio", "decay_ratio"), schedule_fits_run),
    Rule(("model.dtype", *at("grad_scaler", *LOSS_SCALES)), loss_scale_keeps_its_bounds),
    Rule(("optimizer.param_groups",), patterns_compile),
    Rule(("reduce_comm_dtype", "model.dtype"), gradients_fit),
    Rule(at("ckpt", "enable_save_ckpt", "save_ckpt_folder", "checkpoint_every"), saving_knows_where_and_when),
    Rule(at("monitor.alert", "enable_feishu_alert", "feishu_alert_address"), alerts_have_an_address),
)
