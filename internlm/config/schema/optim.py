"""``adam``, ``optimizer``, ``lr_scheduler``, ``beta2_scheduler``, ``hybrid_zero_optimizer``, ``grad_scaler``,
``loss``."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.fields import (
    Count,
    CountOrZero,
    Decay,
    Finite,
    Fraction,
    LastStep,
    MoreThanOne,
    NonNegative,
    Positive,
    Section,
    Shrinking,
)


class AdamConfig(Section):
    """``adam``: AdamW (arXiv 1711.05101)."""

    lr: Positive
    """Peak learning rate."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.95
    """Decay of the second moment."""
    adam_beta2_c: NonNegative = 0
    """Exponent of the beta2 schedule; 0: constant."""
    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    decay_norm_and_bias: bool = True
    """Decay norms and biases too."""


OptimizerName = Literal["AdamW", "Muon", "Lion"]


class ParamGroupConfig(Section):
    """One of ``optimizer.param_groups``: parameters that are trained in another way."""

    pattern: str
    """Which: a regular expression that is found in their names, as in ``"norm"`` or ``"^embedding"``."""
    lr_scale: NonNegative = 1.0
    """Factor on the learning rate, whatever its schedule."""
    weight_decay: NonNegative | None = None
    """Weight decay; absent: as without the group."""
    type: OptimizerName | None = None
    """Optimizer; absent: as without the group."""


class OptimizerConfig(Section):
    """``optimizer``: how parameters are updated. Learning rate, betas and weight decay are those of ``adam``."""

    type: OptimizerName = "AdamW"
    """AdamW (arXiv 1711.05101), Lion (arXiv 2302.06675), or Muon for the matrices of hidden layers and AdamW for
    the rest."""
    momentum: Decay = 0.95
    """Of Muon."""
    nesterov: bool = True
    """Of Muon: look one step ahead."""
    ns_steps: Count = 5
    """Of Muon: Newton-Schulz iterations that make a matrix orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Of Muon: scale updates of a matrix [O, I] by 0.2·√max(O, I), so that the learning rate of AdamW fits, or by
    √max(1, O/I)."""
    param_groups: tuple[ParamGroupConfig, ...] = ()
    """Exceptions by name; of several patterns that match, the first counts."""


class LRSchedulerConfig(Section):
    """``lr_scheduler``: zero for init_steps, linear warm-up, then down to eta_min."""

    total_steps: Count | None = None
    """Length of the schedule; absent: data.total_steps."""
    init_steps: CountOrZero = 0
    """Steps at learning rate zero."""
    warmup_ratio: Fraction = 0.0
    """Fraction of total_steps spent warming up."""
    type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Way down from the peak: half a cosine, a line, none, or (warm-up, stable, decay) none and then a line."""
    decay_ratio: Fraction = 0.1
    """Fraction of total_steps that the decay of wsd takes."""
    eta_min: NonNegative = 0.0
    """Learning rate at the end."""
    last_epoch: LastStep = -1
    """Step before the first one."""


class Beta2SchedulerConfig(Section):
    """``beta2_scheduler``: max(init_beta2, 1 − step^(−c)), constant for c ≤ 0."""

    init_beta2: Decay | None = None
    """Smallest beta2; absent: adam.adam_beta2."""
    c: Finite | None = None
    """Exponent; absent: adam.adam_beta2_c."""
    cur_iter: LastStep = -1
    """Step before the first one."""


class HybridZeroConfig(Section):
    """``hybrid_zero_optimizer``: buckets, overlap, clipping."""

    overlap_sync_grad: bool = False
    """Reduce each bucket of gradients while the backward pass still computes others."""
    overlap_sync_param: bool = False
    """Gather each bucket of parameters when the next forward pass needs it, and the one after it meanwhile."""
    reduce_bucket_size: Count | None = None
    """Elements reduced at once, at most; absent: 512 Mi, with either overlap 16 Mi."""
    all_gather_size: Count | None = None
    """Elements gathered at once, at most; absent: as reduce_bucket_size. A bucket is as large as both allow."""
    clip_grad_norm: NonNegative = 0.0
    """Largest global gradient norm; 0: no clipping."""
    use_split_tensor_optim: bool = True
    """Share buckets evenly by element; False: by whole parameters, as Muon's are in any case."""
    fp32_grad_accum: bool = True
    """Accumulate gradients of parameters in half precision in float32; False: in their own type."""
    max_skipped_steps: Count = 64
    """Steps in a row that may be skipped for a gradient that is inf or nan, before the run is given up."""


class FP16Config(Section):
    """``grad_scaler.fp16``: dynamic loss scale."""

    initial_scale: Positive = 2**16
    """Loss scale at the start."""
    min_scale: Positive = 1
    """Smallest loss scale."""
    growth_interval: Count = 1000
    """Steps without overflow before the scale grows."""


class GradScalerConfig(Section):
    """``grad_scaler``: used with float16 only; the scale is 1 otherwise."""

    fp16: FP16Config = FP16Config()
    """The dynamic scale."""
    growth_factor: MoreThanOne = 2
    """Factor of growth."""
    backoff_factor: Shrinking = 0.5
    """Factor after overflows."""
    max_scale: Positive = 2**24
    """Largest loss scale."""
    hysteresis: Count = 2
    """Overflows before the scale falls."""


class LossConfig(Section):
    """``loss``: token cross-entropy, averaged over the valid tokens of the global batch."""

    label_smoothing: Decay = 0.0
    """Probability mass spread evenly over the vocabulary (arXiv 1512.00567)."""
    moe_loss_coeff: NonNegative = 0.1
    """Weight of the router's balance loss."""
    op_type: Literal["auto", "py_vocab_parallel", "flash_vocab_parallel", "torch_naive", "py_naive"] = "auto"
    """Accepted for older configs; the one chunked kernel serves all."""
