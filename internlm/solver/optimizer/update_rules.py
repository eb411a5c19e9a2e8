"""Update rules: AdamW and Lion on the shards of param groups (Muon is in ``muon.py``).

A rule updates the main parameters of its groups from their reduced gradients. Its *state* consists of one tensor per
group and name in ``states``, with an element for each element of this rank's shard of the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from internlm.config.schema import AdamConfig, OptimizerConfig
from internlm.solver.optimizer.param_groups import ParamGroup, ProcessGroups
from internlm.utils.torch_private import foreach_div_

#: Names of optimizer state, which checkpoints use too.
StateName = Literal["exp_avg", "exp_avg_sq", "momentum"]


class UpdateRule:
    """Base class of update rules.

    It allocates the state of a rule, and divides gradients by the loss scale and clipping factor before each update.
    Whether a step is skipped is known on the device only, so a rule computes new values in any case, and a skipped step
    keeps the old ones.
    """

    #: Names of the rule's state tensors.
    states: ClassVar[tuple[StateName, ...]]

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
        """Prepare state beyond the tensors in ``states``; by default there is none."""

    def state_of(self, group: ParamGroup) -> Mapping[StateName, Tensor]:
        """Return the state tensors of ``group`` by name, each with ``group.owned`` elements."""
        return self._states[group]

    def set_updates(self, count: int) -> None:
        """Set the number of updates done before a resume; rules without bias correction ignore it."""

    @torch.no_grad()
    def update(self, lr: float, beta2: float, divisor: Tensor, skip: Tensor) -> None:
        """Divide the gradients by ``divisor``, and update all main parameters from them.

        Args:
            lr: Learning rate, which each group multiplies by its ``lr_scale``.
            beta2: Decay rate of the second moment, or of Lion's momentum; Muon does not use it.
            divisor: Loss scale times the factor by which clipping reduces the gradient norm (1: no clipping), a float64
                scalar.
            skip: Whether parameters and state keep their values, a bool scalar.
        """
        for group in self.groups:
            foreach_div_(group.grad_shards, divisor)
            self._update(group, lr * group.key.lr_scale, beta2, skip)

    def _update(self, group: ParamGroup, lr: float, beta2: float, skip: Tensor) -> None:
        """Update the main parameters of ``group`` from its gradients, which are already divided."""
        raise NotImplementedError


def replace_unless(skip: Tensor, target: Tensor, values: Tensor) -> None:
    """Copy ``values`` to ``target``, unless the bool scalar ``skip`` is true."""
    # A product with 0 or 1 instead would let the inf or NaN of a skipped step through.
    torch.where(skip, target, values, out=target)


class AdamW(UpdateRule):
    """AdamW update rule (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's fused kernel."""

    states = ("exp_avg", "exp_avg_sq")

    def _prepare(self) -> None:
        parameters = [[nn.Parameter(shard) for shard in group.main_shards] for group in self.groups]
        self.fused = torch.optim.AdamW(
            [
                {"params": shards, "weight_decay": group.key.weight_decay}
                for group, shards in zip(self.groups, parameters, strict=True)
            ],
            eps=self.adam.adam_eps,
            fused=True,
        )
        for group, shards in zip(self.groups, parameters, strict=True):
            self._attach_state(group, shards)

    def _attach_state(self, group: ParamGroup, parameters: Sequence[nn.Parameter]) -> None:
        """Set the state of torch's optimizer to views of the tensors in ``_states``.

        torch would otherwise create its own state in the first step. With views, a checkpoint can be loaded before the
        first step, and each moving average stays one tensor over the shard.
        """
        averages = zip(*(group.split(state) for state in self._states[group].values()), strict=True)
        for parameter, grad, (exp_avg, exp_avg_sq) in zip(parameters, group.grad_shards, averages, strict=True):
            parameter.grad = grad
            step = torch.zeros((), dtype=torch.float32, device=grad.device)
            self.fused.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def set_updates(self, count: int) -> None:
        """Set the number of updates done before a resume, on which Adam's bias correction depends."""
        for state in self.fused.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def update(self, lr: float, beta2: float, divisor: Tensor, skip: Tensor) -> None:
        """Divide the gradients by ``divisor``, and update all main parameters from them, unless ``skip`` is true."""
        # The kernel divides gradients while it reads them, which saves a pass over memory. But it accepts the divisor
        # in float32 only, which is not precise enough for float64 parameters.
        double = any(group.main_dtype == torch.float64 for group in self.groups)
        for group, options in zip(self.groups, self.fused.param_groups, strict=True):
            options["lr"], options["betas"] = lr * group.key.lr_scale, (self.adam.adam_beta1, beta2)
            if double:
                foreach_div_(group.grad_shards, divisor)
        self.fused.grad_scale = None if double else divisor.float()  # type: ignore[attr-defined]
        # With ``found_inf`` of 1, the kernel writes nothing, and the count of updates does not change.
        self.fused.found_inf = skip.float()  # type: ignore[attr-defined]
        self.fused.step()


class Lion(UpdateRule):
    """Lion update rule (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    The direction of an update is the sign of an interpolation between momentum and gradient.
    """

    states = ("exp_avg",)

    def _update(self, group: ParamGroup, lr: float, beta2: float, skip: Tensor) -> None:
        momenta, decay = group.split(self._states[group]["exp_avg"]), 1 - lr * group.key.weight_decay
        for main, momentum, grad in zip(group.main_shards, momenta, group.grad_shards, strict=True):
            direction = torch.lerp(momentum, grad, 1 - self.adam.adam_beta1).sign_()
            replace_unless(skip, main, torch.add(main * decay, direction, alpha=-lr))
            # After the update, unlike Adam: the direction weighs the new gradient more than the stored momentum does.
            replace_unless(skip, momentum, torch.lerp(momentum, grad, 1 - beta2))
