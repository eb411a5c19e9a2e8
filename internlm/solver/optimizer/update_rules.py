"""Update rules: what becomes of parameters, given their gradients.

A rule works on the shards of the groups that it is made for: main parameters and gradients in parts, one for each
bucket. What it remembers of each element, its *state*, is one tensor over the shard, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, OptimizerConfig
from internlm.solver.optimizer.param_groups import ParamGroup, ProcessGroups
from internlm.utils.torch_private import (
    foreach_add_,
    foreach_div_,
    foreach_lerp,
    foreach_lerp_,
    foreach_mul_,
    foreach_sign_,
)


class UpdateRule:
    """What rules have in common: state, and gradients to be divided by something first."""

    #: Names of the state.
    states: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        adam: AdamConfig,
        optimizer: OptimizerConfig,
        process_groups: ProcessGroups,
    ) -> None:
        self.groups, self.adam, self.optimizer, self.process_groups = groups, adam, optimizer, process_groups
        self._states = {group: {name: group.new_state() for name in self.states} for group in groups}
        self._prepare()

    def _prepare(self) -> None:
        """What else is needed before the first update."""

    def state_of(self, group: ParamGroup) -> Mapping[str, Tensor]:
        """The state of a group's shard."""
        return self._states[group]

    def set_updates(self, count: int) -> None:
        """So many updates were done before."""

    @torch.no_grad()
    def update(self, lr: float, beta2: float, divisor: float) -> None:
        """Update every parameter, of gradients that are to be divided by ``divisor``."""
        for group in self.groups:
            if divisor != 1.0:
                foreach_div_(group.grad_parts, divisor)
            self._update(group, lr * group.kind.lr_scale, beta2)

    def _update(self, group: ParamGroup, lr: float, beta2: float) -> None:
        """The parameters of one group."""
        raise NotImplementedError


class AdamW(UpdateRule):
    """AdamW (arXiv 1711.05101), by torch's fused kernel."""

    states = ("exp_avg", "exp_avg_sq")

    def _prepare(self) -> None:
        parameters = [[nn.Parameter(part) for part in group.main_parts] for group in self.groups]
        self.torchs = torch.optim.AdamW(
            [
                {"params": each, "weight_decay": group.kind.weight_decay}
                for group, each in zip(self.groups, parameters, strict=True)
            ],
            eps=self.adam.adam_eps,
            fused=True,
        )
        for group, each in zip(self.groups, parameters, strict=True):
            self._adopt(group, each)

    def _adopt(self, group: ParamGroup, parameters: Sequence[nn.Parameter]) -> None:
        """The state from the start, so that a checkpoint can be loaded before the first step."""
        averages = zip(*(group.split(state) for state in self._states[group].values()), strict=True)
        for parameter, grad, pair in zip(parameters, group.grad_parts, averages, strict=True):
            parameter.grad = grad
            step = torch.zeros((), dtype=torch.float32, device=grad.device)
            self.torchs.state[parameter] = {"step": step, **dict(zip(self.states, pair, strict=True))}

    def set_updates(self, count: int) -> None:
        """For the correction of the averages' bias."""
        for state in self.torchs.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def update(self, lr: float, beta2: float, divisor: float) -> None:
        """The kernel divides gradients as it reads them, but knows the divisor in float32 only, which is too coarse for
        float64."""
        double = any(group.main_dtype == torch.float64 for group in self.groups)
        for group, options in zip(self.groups, self.torchs.param_groups, strict=True):
            options["lr"], options["betas"] = lr * group.kind.lr_scale, (self.adam.adam_beta1, beta2)
            if double and divisor != 1.0:
                foreach_div_(group.grad_parts, divisor)
        scale = None if double or divisor == 1.0 else torch.tensor(divisor, device=self.groups[0].grads.device)
        self.torchs.grad_scale = scale  # type: ignore[attr-defined]
        self.torchs.step()


class Lion(UpdateRule):
    """Lion (arXiv 2302.06675, algorithm 2): the sign of an interpolation between gradient and momentum."""

    states = ("exp_avg",)

    def _update(self, group: ParamGroup, lr: float, beta2: float) -> None:
        momentum = group.split(self._states[group]["exp_avg"])
        direction = foreach_lerp(momentum, group.grad_parts, 1 - self.adam.adam_beta1)
        foreach_sign_(direction)
        foreach_mul_(group.main_parts, 1 - lr * group.kind.weight_decay)
        foreach_add_(group.main_parts, direction, alpha=-lr)
        foreach_lerp_(momentum, group.grad_parts, 1 - beta2)
