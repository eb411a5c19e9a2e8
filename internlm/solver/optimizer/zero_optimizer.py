"""ZeRO optimizer: parameters in flat buffers, optimizer state sharded over data-parallel ranks.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), with a configurable group over which the state is
sharded (the zero group). A step has five phases:

1. **Reduce** gradients into shards inside the zero group, then over the replicas of each shard, then over ranks with
   partial sums (``grad_reduce.py``).
2. **Measure** the global gradient norm over all pipeline stages; every logical element counts once.
3. **Decide**: if the norm or the loss is inf or NaN, all ranks skip the step (``loss_scale.py``). The decision stays on
   the device: phases 4 and 5 run in any case, and keep all values as they are.
4. **Update** this rank's shard from clipped gradients, by the update rule of each group (``update_rules.py``,
   ``muon.py``), and copy main parameters to model parameters.
5. **Gather** the model parameters inside the zero group (``param_gather.py``).

``param_groups.py`` groups parameters by their update settings; ``flat_buffers.py`` lays the groups out in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from internlm.accelerator import is_host, to_device
from internlm.config.schema import AdamConfig, HybridZeroConfig, OptimizerConfig
from internlm.config.schema.optim import OptimizerName
from internlm.core.context.layout import ParallelMode
from internlm.core.parallel.collectives import all_reduce
from internlm.core.parallel.param_state import named_parameters
from internlm.solver.optimizer.flat_buffers import FlatParamGroup, FullyShardedParamGroup
from internlm.solver.optimizer.grad_reduce import FullyShardedReducer, GradReducer
from internlm.solver.optimizer.loss_scale import (
    FIRST_ROW,
    SKIPPED_IN_A_ROW,
    UPDATES,
    LocalGradientCheck,
    LossScale,
    OptimizerStep,
    first_false,
)
from internlm.solver.optimizer.muon import Muon
from internlm.solver.optimizer.param_gather import ParamGatherer
from internlm.solver.optimizer.param_groups import ParamGroup, ParamGroupView, ProcessGroups, build_param_groups
from internlm.solver.optimizer.update_rules import AdamW, Lion, StateName, UpdateRule
from internlm.utils.compat import ReplacedNames, naming_current_call
from internlm.utils.errors import Problem, UserError

#: Update rules by their name in configs.
UPDATE_RULES: dict[OptimizerName, type[UpdateRule]] = {"AdamW": AdamW, "Lion": Lion, "Muon": Muon}


class HybridZeroOptimizer(ReplacedNames):
    """ZeRO optimizer that moves the parameters and gradients of a model into its own flat buffers.

    The parameters of a fully sharded model stay in their own memory; ``fully_shard`` then reduces gradients and gathers
    parameters inside the zero group. The sum of gradients over all data-parallel ranks must be the gradient of the
    global batch: the loss must be divided by the valid tokens of the global batch, and multiplied by
    ``loss_scale``.

    Args:
        model: Model whose parameters have placements, and their final dtype and device.
        adam: Hyperparameters of the update rules, such as eps and weight decay.
        config: Settings for buckets, overlap and gradient clipping.
        process_groups: Process groups to communicate over; default: groups of one rank.
        optimizer: Settings for the update rule and for individual param groups; default: AdamW.
        loss_scale: Loss scale for float16 training; default: 1.
        reduce_dtype: Dtype in which gradients are sent; default: the dtype in which they are accumulated.

    Raises:
        ConfigError: A pattern of ``optimizer.param_groups`` assigns Muon to a parameter that is not a matrix.
        UserError: A parameter has no placement, or no parameter is trainable.
    """

    replaced: ClassVar[Mapping[str, str]] = {
        "backward": "Use trainer.execute_schedule, which runs forward and backward with the loss scale",
        "clip_grad_norm": "Set hybrid_zero_optimizer.clip_grad_norm, by which step() clips",
        "grad_scaler": "Use optimizer.loss_scale",
        "add_param_group": "Set optimizer.param_groups in the config",
        "state": "Use optimizer.state_of(group) for each group in optimizer.groups",
    }

    def __init__(
        self,
        model: nn.Module,
        adam: AdamConfig,
        config: HybridZeroConfig | None = None,
        process_groups: ProcessGroups | None = None,
        *,
        optimizer: OptimizerConfig | None = None,
        loss_scale: LossScale | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.process_groups = config or HybridZeroConfig(), process_groups or ProcessGroups()
        self.scaler = loss_scale or LossScale()
        self._adam, self._last_lr, self._last_beta2 = adam, adam.lr, adam.adam_beta2  # before the first update
        optimizer, zero = optimizer or OptimizerConfig(), self.process_groups.zero

        # Group the parameters, then move them into flat buffers, except those that fully_shard has sharded already.
        by_key = self._by_key = build_param_groups(named_parameters(model), adam, optimizer)
        if not by_key:
            pipeline = self.process_groups.pipeline
            message = f"pipeline stage {pipeline.rank} (of {pipeline.size}) has no parameter with requires_grad=True"
            raise UserError(Problem("model", message, "Keep at least one parameter of every stage trainable"))
        flat: list[FlatParamGroup] = []
        sharded: list[FullyShardedParamGroup] = []
        for key, parameters in by_key.items():
            if parameters[0].is_fully_sharded:
                sharded.append(FullyShardedParamGroup(key, parameters))
            else:
                flat.append(FlatParamGroup(key, parameters, zero, self.config))
        self.groups: list[ParamGroup] = [*flat, *sharded]
        for group in self.groups:
            group.attach_grads()

        # One object for each phase that has state.
        self._reducer = (
            FullyShardedReducer(sharded, self.process_groups, reduce_dtype)
            if sharded
            else GradReducer(flat, self.process_groups, reduce_dtype, self.config.overlap_sync_grad)
        )
        unknown = {group.key.rule for group in self.groups} - UPDATE_RULES.keys()
        assert not unknown, f"no update rule is registered as {unknown}, so its parameters would never change"
        self.rules = [
            rule([group for group in self.groups if group.key.rule == name], adam, optimizer, self.process_groups)
            for name, rule in UPDATE_RULES.items()
            if any(group.key.rule == name for group in self.groups)
        ]
        self.device = self.groups[0].grads.device
        self.scaler.to(self.device)
        self.last_step = self._step_with_counts(updates=0, skipped_in_a_row=0)
        self._is_last_chance = self._ends_if_skipped()
        self._checks_gradients = self._is_last_chance  # before they are reduced
        self._are_gradients_used = False  # by an earlier step
        self._gatherer = ParamGatherer(flat, zero)
        if self.config.overlap_sync_param:
            self._gatherer.gather_lazily(model)

    # -- a step -------------------------------------------------------------------------------------------------------
    def begin_step(self, micro_batches: int | None = None) -> None:
        """Begin new gradients, before the first micro-batch; until it gets one, ``parameter.grad`` is None.

        Args:
            micro_batches: Number of micro-batches in the step; default: unknown, so nothing is reduced during backward.

        Raises:
            UserError: The parameters were moved to other memory after the optimizer was created.
        """
        self._is_last_chance, self._are_gradients_used = self._ends_if_skipped(), False
        self._checks_gradients = self._is_last_chance or self._follows_skipped()
        self._reducer.begin_step(None if self._checks_gradients else micro_batches)
        for group in self.groups:
            group.begin_step()

    def _ends_if_skipped(self) -> bool:
        """Return whether the run ends if the next step is skipped."""
        # The outcome of the last step may still be on its way to the host, and waiting for it is a host sync: ask for
        # it only if it could matter. With a limit of 1 or 2, that is in every step, unless the step has been logged.
        if self._skipped_before_last + 2 < self.config.max_skipped_steps:
            return False
        return self.last_step.skipped_in_a_row + 1 >= self.config.max_skipped_steps

    def _follows_skipped(self) -> bool:
        """Return whether the last step whose outcome the host has read was skipped.

        The gradients of the next step are then checked before they are reduced, because a NaN in a sum cannot be
        attributed to one rank. In every step, this would read all gradients once more.
        """
        if is_host(self.groups[0].grads):
            return bool(self.last_step.host_outcome.read_arrived()[SKIPPED_IN_A_ROW])
        return self._skipped_before_last > 0

    @property
    def updates(self) -> int:
        """Number of steps so far that were not skipped."""
        return self.last_step.updates

    @property
    def skipped_in_a_row(self) -> int:
        """Number of steps skipped in a row up to now."""
        return self.last_step.skipped_in_a_row

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Begin new gradients; equivalent to :meth:`begin_step` with an unknown number of micro-batches.

        ``set_to_none`` is ignored, because gradients are views of flat buffers; loops for torch's optimizers pass it.
        """
        self.begin_step()

    def begin_reduction(self) -> None:
        """Launch the reduction of gradients, after the last backward pass of the step.

        Without ``overlap_sync_grad`` this does nothing, and :meth:`step` reduces the gradients.
        """
        if self.config.overlap_sync_grad and not self._checks_gradients:
            self._reducer.begin()

    @naming_current_call("trainer.step(), which passes the values of the step")
    @torch.no_grad()
    def step(self, lr: float, beta2: float, loss: Tensor | None = None) -> OptimizerStep:
        """Run the five phases of a step: reduce, measure, decide, update and gather.

        Args:
            lr: Learning rate of this step.
            beta2: Decay rate of the second moment in this step.
            loss: Loss of all ranks, in any unit, a scalar on the device; if it is inf or NaN, the step is skipped, as
                for a gradient.

        Returns:
            Result of the step, which is still on the device. If its ``updated`` is False, parameters and optimizer
            state have not changed.

        Raises:
            UserError: No gradients were begun since the last step.
        """
        if self._are_gradients_used:
            message = "no new gradients were begun since the last step, whose gradients are still in the buffers"
            todo = "Call trainer.zero_grad() or optimizer.zero_grad() in each step; model.zero_grad() is not enough"
            raise UserError(Problem("optimizer.step", message, todo))
        self._are_gradients_used = True
        # The device has all of this step's forward and backward passes in its queue, so this does not let it idle.
        before = self.last_step.host_outcome.read_arrived()
        self._skipped_before_last = int(before[SKIPPED_IN_A_ROW])
        self._last_lr, self._last_beta2 = lr, beta2
        # Complete the all-gathers of blocks that no forward pass has called: they would overwrite updated parameters.
        self._gatherer.finish()
        local_gradients = None
        if self._checks_gradients:
            for group in self.groups:
                group.complete_grads()
            local_gradients = LocalGradientCheck(self.groups)

        # 1. Reduce.
        self._reducer.reduce()

        # 2. Measure.
        scale = self.scaler.tensor
        rows = self._row_norms()
        norm = self._global_norm(rows) / scale

        # 3. Decide. The norm is the same number on every rank, so no further collective is needed to agree.
        skip = ~norm.isfinite() if loss is None else ~(norm.isfinite() & loss.isfinite())
        self.scaler.update(overflow=skip)
        outcome = self._outcome(norm, skip, scale, rows)
        self.last_step = OptimizerStep(outcome, local_gradients, self._is_last_chance)
        self.last_step.host_outcome.begin_copy()

        # 4. Update.
        self._update(lr, beta2, norm, scale, skip)

        # 5. Gather.
        self._gatherer.begin()
        return self.last_step

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Reduce the gradients and return their L2 norm, a float64 scalar on the device; nothing is updated.

        Call it instead of :meth:`step`, after the backward passes. Collective.
        """
        self._are_gradients_used = True
        self._gatherer.finish()
        self._reducer.reduce()
        return self._global_norm(self._row_norms()) / self.scaler.tensor

    def _row_norms(self) -> list[list[Tensor]]:
        """Return the norms of the rows of each group; none of a copy, whose elements another group has."""
        return [[] if self._is_copy(group) else row_norms(group.grad_shards) for group in self.groups]

    def _outcome(self, norm: Tensor, skip: Tensor, scale: Tensor, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the outcome of a step (see :class:`OptimizerStep`), which continues the counts of the last step."""
        counts = self.last_step.host_outcome.tensor
        skipped_in_a_row = (counts[SKIPPED_IN_A_ROW] + 1) * skip
        # Rows must be searched now, since the next backward pass overwrites the gradients. An accelerator searches them
        # in every step, as it would have to be asked whether this one is skipped; the CPU need not.
        is_searched = not is_host(skip) or bool(skip)
        in_order = [row for of_group in rows for row in of_group if is_searched]
        first_row = first_false(torch.cat(in_order).isfinite()) if in_order else norm.new_full((), -1)
        return torch.stack([norm, skip.double(), scale, skipped_in_a_row, counts[UPDATES] + ~skip, first_row.double()])

    def _step_with_counts(self, updates: int, skipped_in_a_row: int) -> OptimizerStep:
        """Return the result of an earlier step with these counts."""
        self._skipped_before_last = skipped_in_a_row
        outcome = [0.0, float(skipped_in_a_row > 0), 1.0, float(skipped_in_a_row), float(updates), -1.0]
        step = OptimizerStep(to_device(torch.tensor(outcome, dtype=torch.float64), self.device))
        step.host_outcome.set(outcome)
        return step

    def first_nonfinite(self, step: OptimizerStep) -> str | None:
        """Return the first parameter in this rank's shards whose reduced gradient was inf or NaN in ``step``, or None.

        Gradients are searched by rows of up to 256 elements; if the row has elements of several parameters, all are
        named. ``step`` must have arrived on the host, or this is a host sync.
        """
        first = int(step.host_outcome.read_arrived()[FIRST_ROW])
        for group in self.groups:
            for index, shard in enumerate(() if self._is_copy(group) else group.grad_shards):
                length = _row_length(shard.numel())
                rows = shard.numel() // length if length else 0
                if 0 <= first < rows:
                    start, stop = first * length, (first + 1) * length
                    held = (piece for piece in group.shard_slices() if piece.index == index)
                    return " or ".join(piece.name for piece in held if piece.lo < stop and start < piece.hi)
                first -= rows
        return None

    def _global_norm(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the L2 norm of all gradients, a float64 scalar; each logical element counts once in any layout.

        Args:
            rows: Norms of the rows of each group (:func:`row_norms`).
        """
        # One sum per mode: the ranks of its group hold different elements of split parameters, but equal copies of
        # whole parameters.
        modes = [None, *self.process_groups.by_split]
        squares = torch.zeros(len(modes), dtype=torch.float64, device=self.device)
        for group, of_group in zip(self.groups, rows, strict=True):
            if of_group:
                squares[modes.index(group.key.split_over)] += sum_of_squares(of_group)
        all_reduce(squares, self.process_groups.zero)
        for mode, square in zip(modes, squares, strict=True):
            if mode is not None:
                # Add zero times the sum of whole parameters: a nan in it may be on one rank only, and must reach all.
                all_reduce(square.add_(squares[0] * 0), self.process_groups.by_split[mode])
        return all_reduce(squares.sum(), self.process_groups.pipeline).sqrt()

    def _is_copy(self, group: ParamGroup) -> bool:
        """Return whether ``group`` is the last stage's copy of a tied embedding, which the norm does not count."""
        return group.key.partial_over is ParallelMode.PIPELINE and self.process_groups.ends.rank > 0

    def _update(self, lr: float, beta2: float, norm: Tensor, scale: Tensor, skip: Tensor) -> None:
        clip = self.config.clip_grad_norm
        # One divisor for unscaling and clipping, so that gradients are read once; 1e-6 as in torch's clip_grad_norm_.
        divisor = scale * ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else scale
        for rule in self.rules:
            rule.update(lr, beta2, divisor, skip)
        for group in self.groups:
            group.copy_main_to_model_params()

    # -- settings that scripts read -----------------------------------------------------------------------------------
    @property
    def loss_scale(self) -> Tensor:
        """Loss scale of the next step, a float64 scalar on the device."""
        return self.scaler.tensor

    @property
    def param_groups(self) -> list[ParamGroupView]:
        """Settings of each param group in the last update (before the first: in the config), as in torch; read-only."""
        lr, betas = self._last_lr, (self._adam.adam_beta1, self._last_beta2)
        return [
            ParamGroupView(
                params=[named.parameter for named in self._by_key[group.key]],
                lr=lr * group.key.lr_scale,
                betas=betas,
                eps=self._adam.adam_eps,
                weight_decay=group.key.weight_decay,
            )
            for group in self.groups
        ]

    # -- parameters that are read or set from outside -----------------------------------------------------------------
    def gather_parameters(self) -> None:
        """Complete the parameter all-gathers that ``overlap_sync_param`` postpones.

        Collective: all ranks must call this method. All model parameters are up to date afterwards.
        """
        self._gatherer.finish()

    def copy_model_to_main_params(self) -> None:
        """Copy model parameters to main parameters, for code that sets model parameters itself.

        Half-precision parameters have separate main parameters, so without this copy the next update would overwrite
        the new values.

        Raises:
            UserError: A parameter all-gather is not complete (``overlap_sync_param``) and may overwrite the new values.
                Call :meth:`gather_parameters` before setting parameters.
        """
        self._gatherer.require_all("optimizer.copy_model_to_main_params()")
        for group in self.groups:
            group.copy_model_to_main_params()

    def copy_main_to_model_params(self) -> None:
        """Copy main parameters to model parameters, and all-gather the model parameters.

        Collective: all ranks must call this method.
        """
        for group in self.groups:
            group.copy_main_to_model_params()
        self._gatherer.gather_all()

    # -- state --------------------------------------------------------------------------------------------------------
    def state_of(self, group: ParamGroup) -> Mapping[StateName, Tensor]:
        """Return the optimizer-state tensors of ``group`` by name, each with ``group.owned`` elements."""
        return next(rule.state_of(group) for rule in self.rules if group in rule.groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is not held in tensors: counters and the loss scale."""
        counts = {"updates": self.updates, "skipped_in_a_row": self.skipped_in_a_row}
        return {**counts, "loss_scale": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.last_step = self._step_with_counts(state["updates"], state["skipped_in_a_row"])
        self.scaler.load_state_dict(state["loss_scale"])
        for rule in self.rules:
            rule.set_updates(self.updates)


def row_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norms of rows of at most 256 elements, for each tensor that is not empty."""
    # Row by row first: on the CPU, a float32 sum of ten million elements is off by 1e-4, and a float64 sum takes many
    # times as long.
    return [
        torch.linalg.vector_norm(tensor.view(-1, _row_length(tensor.numel())), dim=1)
        for tensor in tensors
        if tensor.numel()
    ]


def sum_of_squares(rows: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, from the norms of their rows, as a float64 scalar."""
    norms = [torch.linalg.vector_norm(of_tensor, dtype=torch.float64) for of_tensor in rows]
    return torch.stack(norms).square().sum()


def _row_length(numel: int) -> int:
    """Return the largest power of two, at most 256, that divides ``numel``."""
    return min(numel & -numel, 256)
