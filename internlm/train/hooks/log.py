"""Hooks that log the memory plan before the first step, the metrics of each step, and the traffic after the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from internlm import accelerator
from internlm.config import Config
from internlm.core.context import ParallelMode
from internlm.core.context import global_context as gpc
from internlm.core.parallel.ledger import LEDGER, format_traffic
from internlm.core.scheduler.loss import CORRECT, LOSS, TOKENS
from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.costs import ParamInventory, Plan, format_worst_plan, memory_plan
from internlm.costs.flops import hardware_flops_per_token, model_flops_per_token
from internlm.data.loader import TrainLoader
from internlm.monitor import MetricsWriter, Throughput
from internlm.train.inventory import build_inventory, inventory_of
from internlm.utils.logger import get_logger

T = TypeVar("T")
log = get_logger()


class LogMemoryPlan(Hook):
    """Hook that logs, before the first step, the memory plan of the pipeline stage that needs the most memory."""

    def before_run(self, trainer: Trainer) -> None:
        """Log the memory plan, or a warning if it cannot be computed."""
        text = _attempt(lambda: format_worst_plan(_plans(trainer.model), accelerator.device_memory()), "")
        if text:
            log.info(text)


def _plans(model: nn.Module) -> dict[int, Plan]:
    """Return the memory plan of each stage; for a user's own model, return the plan of this rank's stage only."""
    own, device = _own_inventory(model), accelerator.device_type()
    if own.spec is None:  # other stages are built from the registered model, which may differ from this one
        return {own.stage: memory_plan(own, device_type=device)}
    others = [stage for stage in range(own.groups.p.size) if stage != own.stage]
    inventories = [own, *(build_inventory(own.config, own.world_size, stage) for stage in others)]
    return {
        inventory.stage: memory_plan(inventory, device_type=device)
        for inventory in sorted(inventories, key=lambda inventory: inventory.stage)
    }


def own_plan(model: nn.Module) -> Plan:
    """Return the memory plan of this rank; empty if it cannot be computed."""
    zero_rank, device = gpc.get_local_rank(ParallelMode.ZERO1), accelerator.device_type()
    return _attempt(lambda: memory_plan(_own_inventory(model), zero_rank=zero_rank, device_type=device), {})


def _own_inventory(model: nn.Module) -> ParamInventory:
    return inventory_of(model, gpc.config, dist.get_world_size(), gpc.get_local_rank(ParallelMode.PIPELINE))


def _attempt(make: Callable[[], T], otherwise: T) -> T:
    """Return ``make()``; if it raises, log a warning and return ``otherwise``."""
    # A faulty formula must not end a run.
    try:
        return make()
    except Exception as error:
        log.warning(f"the memory plan could not be computed: {error!r}")
        return otherwise


class ReportTraffic(Hook):
    """Hook of ``--ledger`` that logs, after the last step, this rank's collectives and the bytes that the rank sent."""

    def __init__(self) -> None:
        self.before = LEDGER.snapshot()
        self.steps = 0

    def before_run(self, trainer: Trainer) -> None:
        """Take a snapshot of the communication ledger, to exclude the traffic of building the model and of resuming."""
        self.before = LEDGER.snapshot()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Count the step, for the averages per step."""
        self.steps += 1

    def after_run(self, trainer: Trainer) -> None:
        """Log the collectives and bytes sent since :meth:`before_run`."""
        traffic = LEDGER.since(self.before)
        log.info(f"sent by this rank in {self.steps} steps\n{format_traffic(traffic, max(self.steps, 1))}")


class LogMetrics(Hook):
    """Hook that writes the metrics of each step; it is added on the logging rank only.

    The keys of the original InternEvo log line come first, in their original order.

    Args:
        config: Config of the run.
        types: Names of the dataset types.
        world_size: Number of ranks, each with its own device.
        data_size: Size of the data group, whose ranks read different tokens.
        writer: Writer of the metrics to all destinations.
        loader: Training loader, whose plan gives the rows of each step.
    """

    def __init__(
        self,
        config: Config,
        types: Sequence[str],
        world_size: int,
        data_size: int,
        writer: MetricsWriter,
        loader: TrainLoader,
    ) -> None:
        self.types, self.writer, self.loader = types, writer, loader
        self.world_size, self.data_size = world_size, data_size
        self.throughput = Throughput(world_size)
        seq_len = config.data.seq_len
        self.hardware_flops = hardware_flops_per_token(config.model, seq_len)
        self.model_flops = model_flops_per_token(config.model, seq_len)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Write the metrics of the step."""
        report.read()
        rows = self.loader.plan.rows_of_step(report.step)
        tokens = self.loader.plan.without_padding_rows(report.step, report.shape.tokens * self.data_size)
        self.throughput.add(tokens, report.step_time)
        # Padding counts here, as in the published metrics; ``real_tgs`` counts valid tokens only.
        per_device = tokens / self.world_size / report.step_time
        self.writer.write(
            report.step,
            # The keys of the published log line come first, in its order; further keys follow at the end.
            {
                "tflops": per_device * self.hardware_flops / 1e12,
                "step": report.step,
                "loss": report.result.loss,
                "real_tgs": report.result.valid_tokens / self.world_size / report.step_time,
                "tgs (tokens/gpu/second)": per_device,
                **self.throughput.metrics(),
                "lr": report.lr,
                "loss_scale": report.update.loss_scale,
                "grad_norm": report.update.grad_norm,
                "micro_num": report.shape.micro_num,
                "num_consumed_tokens": trainer.state.num_consumed_tokens,
                "inf_nan_skip_batches": trainer.state.inf_nan_skip_batches,
                "num_samples_in_batch": report.shape.sequences,
                "largest_length": report.shape.largest_length,
                "largest_batch": report.shape.largest_batch,
                "smallest_batch": report.shape.smallest_batch,
                "adam_beta2": report.beta2,
                "fwd_bwd_time": report.fwd_bwd_time,
                **_metrics(report.result.host_sums.read(), self.types),
                "model_tflops": per_device * self.model_flops / 1e12,
                "data_time": report.data_time,
                **{f"data_{name}": value for name, value in rows._asdict().items()},
            },
        )

    def after_run(self, trainer: Trainer) -> None:
        """Close the writer."""
        self.writer.close()


def _metrics(sums: Sequence[Sequence[float]], types: Sequence[str]) -> dict[str, float | int]:
    """Return the accuracy, perplexity and loss of a step, and the accuracy, tokens and loss of each dataset type.

    Args:
        sums: Summed losses, correct predictions and tokens of the step by dataset type, [4, types].
        types: Names of the dataset types.
    """
    loss, correct, tokens = (sums[row] for row in (LOSS, CORRECT, TOKENS))
    mean = sum(loss) / max(sum(tokens), 1)
    metrics: dict[str, float | int] = {
        "acc": sum(correct) / max(sum(tokens), 1),
        # exp overflows in float64 beyond 709.
        "perplexity": math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean,
    }
    metrics |= {f"acc/{name}": c / max(n, 1) for name, c, n in zip(types, correct, tokens, strict=True)}
    metrics |= {f"tokens/{name}": int(n) for name, n in zip(types, tokens, strict=True)}
    metrics["loss_from_metric"] = mean
    metrics |= {f"loss/{name}": s / max(n, 1) for name, s, n in zip(types, loss, tokens, strict=True)}
    return metrics
