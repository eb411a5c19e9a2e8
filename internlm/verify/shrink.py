"""Search for the smallest layout in which ranks still differ from one process."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from internlm.accelerator import CPU
from internlm.config import Config
from internlm.utils.errors import UserError
from internlm.verify.configs import Devices, Plan, Values, as_overrides, make_plan
from internlm.verify.processes import RankError

#: Seconds after which the search ends with the smallest layout found so far.
LIMIT = 120.0
#: Dtype in which rounding hides hardly any mistake, and is taken for none.
DTYPE = "float64"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Arguments of ``make_plan``: the options of ``internlm verify`` that lead to a plan."""

    source: str
    overrides: tuple[str, ...]
    world_size: int | None
    """Number of ranks; None: the default of ``make_plan``."""
    steps: int
    dtype: str
    shrink: bool
    devices: Devices
    seed: int
    changed: dict[str, Any] = field(default_factory=dict)
    """Values by key that make the layout smaller; they take precedence over ``overrides``."""

    def plan(self) -> Plan:
        """Resolve the configs.

        Raises:
            ConfigError: The config is invalid.
        """
        plan = make_plan(
            self.source,
            (*self.overrides, *as_overrides(self.changed)),
            self.world_size,
            steps=self.steps,
            dtype=self.dtype,
            shrink=self.shrink,
            devices=self.devices,
        )
        return replace(plan, seed=self.seed)

    def command(self) -> str:
        """Return the command that compares this layout."""
        words = ["internlm", "verify", self.source, "--world", str(self.world_size), "--steps", str(self.steps)]
        words += [] if self.dtype == DTYPE else ["--dtype", self.dtype]
        words += ["--seed", str(self.seed)]
        words += [] if self.devices.type == CPU.name else ["--device", self.devices.type]
        words += ["--debug-size"] * self.shrink
        words += [word for override in self._merged() for word in ("--set", override)]
        return " ".join(map(_quoted, words))

    def _merged(self) -> list[str]:
        kept = [each for each in self.overrides if each.partition("=")[0] not in self.changed]
        return [*kept, *as_overrides(self.changed)]


def _quoted(word: str) -> str:
    """Quote a word for a POSIX shell."""
    # In double quotes if the shell replaces nothing there, since values often have single quotes.
    quoted = shlex.quote(word)
    return f'"{word}"' if quoted != word and not set(word) & set('"$`\\!') else quoted


def smallest(attempt: Attempt, still_differs: Callable[[Plan], bool], limit: float = LIMIT) -> Attempt:
    """Return the smallest layout that still differs: none of its sizes can be lowered alone.

    Args:
        attempt: Layout that differs.
        still_differs: Function that runs a plan and returns whether its ranks differ from one process. It may raise a
            UserError or a RankError, which counts as no.
        limit: Seconds after which the search ends with what it has.
    """
    end = time.monotonic() + limit
    # After each success from the start: with one part gone, another may no longer be needed.
    found = True
    while found:
        found = False
        for smaller in _smaller(attempt):
            if time.monotonic() > end:
                return attempt
            if _differs(smaller, still_differs):
                attempt, found = smaller, True
                break
    return attempt


def _differs(attempt: Attempt, still_differs: Callable[[Plan], bool]) -> bool:
    try:
        return still_differs(attempt.plan())
    except (UserError, RankError):
        return False


def _smaller(attempt: Attempt) -> Iterator[Attempt]:
    """Yield layouts that are smaller in one respect, those that remove most first."""
    if attempt.dtype != DTYPE:
        yield replace(attempt, dtype=DTYPE)
    if not attempt.shrink:
        yield replace(attempt, shrink=True)
    plan = attempt.plan()
    for steps in (steps for steps in (1, 2) if steps < attempt.steps):
        yield replace(attempt, steps=steps)
    for data_size in (size for size in (1, 2) if size < plan.data_size):
        yield _changed(attempt, plan, {}, data_size)
    for changes in _lowered(plan.config):
        yield _changed(attempt, plan, changes, plan.data_size)


def _changed(attempt: Attempt, plan: Plan, changes: Values, data_size: int) -> Attempt:
    parallel = plan.config.parallel
    sizes = {
        name: changes.get(f"parallel.{name}.size", getattr(parallel, name).size)
        for name in ("pipeline", "tensor", "weight")
    }
    # The data-parallel size is kept, so that each change takes away one part of the layout only.
    isp = changes.get("parallel.tensor.mode", parallel.tensor.mode) == "isp"
    world_size = sizes["pipeline"] * math.lcm(sizes["tensor"] * data_size, sizes["weight"] if isp else 1)
    changes = {key: value for key, value in changes.items() if value != _value(plan.config, key)}
    return replace(attempt, world_size=world_size, changed={**attempt.changed, **changes})


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


#: Values that take a part of the layout away, with those that need it.
_NO_PIPELINE: Values = {"parallel.pipeline.size": 1, "parallel.pipeline.mode": "1F1B", "model.num_chunks": 1}
_NO_CHUNKS: Values = {"parallel.pipeline.mode": "1F1B", "model.num_chunks": 1}
_NO_TENSOR: Values = {"parallel.tensor.size": 1, "parallel.tensor.mode": "mtp", "parallel.weight.size": 1}
_NO_ZERO: Values = {"parallel.zero1.size": 1, "parallel.zero1.fsdp": False}


def _lowered(config: Config) -> Iterator[Values]:
    """Yield changes of one size each that make a layout smaller."""
    parallel, model = config.parallel, config.model
    stages = parallel.pipeline.size * model.num_chunks
    if model.compile:
        # First: it takes longest, and inside a compiled block no module can be named.
        yield {"model.compile": False}
    if stages > 1:
        yield _NO_PIPELINE
    if model.num_chunks > 1:
        yield _NO_CHUNKS
    if parallel.pipeline.size > 2:
        yield {"parallel.pipeline.size": 2}
    if parallel.tensor.size > 1 or parallel.tensor.mode != "mtp":
        yield _NO_TENSOR
    if parallel.weight.size > 1:
        yield {"parallel.weight.size": 1}
    for name in ("tensor", "weight"):
        if getattr(parallel, name).size > 2:
            yield {f"parallel.{name}.size": 2}
    if parallel.zero1.size != 1 or parallel.zero1.fsdp:
        yield _NO_ZERO
    if model.cpu_offloading:
        yield {"model.cpu_offloading": 0}
    if model.checkpoint:
        yield {"model.checkpoint": False}
    if config.data.micro_num > 1:
        yield {"data.micro_num": 1}
    if config.data.micro_num > 2:
        yield {"data.micro_num": 2}
    if config.data.micro_bsz > 1:
        yield {"data.micro_bsz": 1}
    if model.num_layers > stages:
        # Layers that attend to all tokens are named by their index.
        fewer: Values = {"model.num_layers": stages}
        yield {**fewer, "model.global_layers": ()} if model.global_layers else fewer
