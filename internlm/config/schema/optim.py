"""Config sections of the parameter update: optimizer, schedules, ZeRO buckets, loss scale and loss."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.fields import (
    Count,
    CountOrZero,
    Decay,
    Finite,
    Fraction,
    Items,
    LastStep,
    MoreThanOne,
    NonNegative,
    Positive,
    Section,
    Shrinking,
)

OptimizerName = Literal["AdamW", "Muon", "Lion"]
LRShape = Literal["cosine", "linear", "constant", "wsd"]


class AdamConfig(Section):
    """Learning rate, betas and weight decay of all optimizers, named as in AdamW (arXiv 1711.05101)."""

    lr: Positive
    """Peak learning rate."""
    adam_beta1: Decay = 0.9
    """Decay rate of the first moment."""
    # 0.95 rather than Adam's 0.999: the usual choice for LLMs since GPT-3 (arXiv 2005.14165, appendix B).
    adam_beta2: Decay = 0.95
    """Decay rate of the second moment."""
    adam_beta2_c: NonNegative = 0
    """Exponent c of the beta2 schedule 1 − step^(−c). 0: beta2 is constant."""
    adam_eps: Positive = 1e-8
    """Epsilon, added to the square root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay: each step multiplies parameters by 1 − lr · ``weight_decay``."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to norm weights and biases too."""


class ParamGroupConfig(Section):
    """Entry of ``optimizer.param_groups``: optimizer settings for the parameters whose names match ``pattern``."""

    pattern: str
    """Regular expression searched for in parameter names, such as ``"norm"`` or ``"^embedding"``."""
    lr_scale: NonNegative = 1.0
    """Factor on the learning rate of these parameters. 0 freezes them."""
    weight_decay: NonNegative | None = None
    """Weight decay of these parameters. Default: ``adam.weight_decay``."""
    type: OptimizerName | None = None
    """Optimizer of these parameters. Default: ``optimizer.type``."""


class OptimizerConfig(Section):
    """Update rule and its settings. Learning rate, betas and weight decay are in ``adam``."""

    type: OptimizerName = "AdamW"
    """Update rule: ``AdamW`` (arXiv 1711.05101), ``Lion`` (arXiv 2302.06675), or ``Muon`` for the matrices of
    hidden layers with AdamW for all other parameters."""
    momentum: Decay = 0.95
    """Momentum of Muon."""
    nesterov: bool = True
    """Use Nesterov momentum in Muon."""
    ns_steps: Count = 5
    """Number of Newton-Schulz iterations with which Muon orthogonalises an update."""
    # Rounding to bfloat16 makes updates differ between layouts by more than the order of sums does.
    ns_dtype: Literal["torch.float32", "torch.tf32", "torch.bfloat16"] | None = None
    """Dtype of the Newton-Schulz matmuls. ``torch.tf32`` is float32 with TF32 matmuls on devices that have them, and
    ``torch.bfloat16`` is what torch's Muon uses; both are several times faster on a GPU. Default: the dtype of the main
    parameters, which is at least float32."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on Muon's learning rate for a matrix [O, I]. ``match_rms_adamw``: 0.2·√max(O, I), which suits a learning
    rate tuned for AdamW (arXiv 2502.16982); ``original``: √max(1, O/I)."""
    param_groups: Items[ParamGroupConfig] = ()
    """Settings for parameters selected by name. If several patterns match a name, the first one applies."""


class LRSchedulerConfig(Section):
    """Settings of the learning-rate schedule: zero for ``init_steps``, linear warm-up, then decay to ``eta_min``."""

    total_steps: Count | None = None
    """Length of the schedule in steps. Default: ``data.total_steps``."""
    init_steps: CountOrZero = 0
    """Number of steps with learning rate 0 at the start."""
    warmup_ratio: Fraction = 0.0
    """Fraction of ``total_steps`` over which the learning rate rises linearly to its peak."""
    type: LRShape = "cosine"
    """Decay after warm-up: ``cosine`` (half a period), ``linear``, ``constant`` (no decay), or ``wsd`` (warm-up,
    stable, decay: constant, then linear)."""
    decay_ratio: Fraction = 0.1
    """Fraction of ``total_steps`` over which ``wsd`` decays."""
    eta_min: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    last_epoch: LastStep = -1
    """Step of the schedule that precedes the first step of the run. −1: start at the beginning of the schedule."""


class Beta2SchedulerConfig(Section):
    """Settings of the schedule of AdamW's beta2: max(``init_beta2``, 1 − step^(−c)), constant for c ≤ 0."""

    init_beta2: Decay | None = None
    """Lower bound of beta2. Default: ``adam.adam_beta2``."""
    c: Finite | None = None
    """Exponent c of the schedule 1 − step^(−c). Default: ``adam.adam_beta2_c``."""
    cur_iter: LastStep = -1
    """Step of the schedule that precedes the first step of the run. −1: start at the beginning of the schedule."""


class HybridZeroConfig(Section):
    """Settings of the ZeRO optimizer: buckets, overlap of communication and compute, gradient clipping."""

    overlap_sync_grad: bool = False
    """Reduce each bucket of gradients as soon as it is complete, while the backward pass continues."""
    overlap_sync_param: bool = False
    """All-gather the updated parameters of each block during the next forward pass, while the preceding block runs."""
    reduce_bucket_size: Count | None = None
    """Largest number of elements reduced in one collective. Default: 16 Mi elements with ``overlap_sync_grad`` or
    ``overlap_sync_param``, else 512 Mi."""
    all_gather_size: Count | None = None
    """Largest number of elements all-gathered in one collective. Default: ``reduce_bucket_size``. A bucket is reduced
    and all-gathered as a whole, so the smaller of the two sizes applies."""
    clip_grad_norm: NonNegative = 0.0
    """Maximum global gradient norm. If it is exceeded, all gradients are scaled down to this norm. 0: no clipping."""
    use_split_tensor_optim: bool = True
    """Shard buckets evenly by elements. False: shard them by whole parameters, as buckets of Muon always are."""
    # bfloat16 has 8 significant bits: sums over many micro-batches lose small terms.
    fp32_grad_accum: bool = True
    """Accumulate the gradients of bfloat16 and float16 parameters in float32. False: accumulate them in the
    parameter's dtype, which halves their memory but loses precision."""
    # A loss scale falls from its initial value to 1 in about 16 skipped steps; far more mean that the run has diverged.
    max_skipped_steps: Count = 64
    """Stop with an error after this many consecutive steps were skipped because of a non-finite loss or gradient."""


class FP16Config(Section):
    """Settings of the dynamic loss scale for float16."""

    initial_scale: Positive = 2**16
    """Loss scale at the start."""
    min_scale: Positive = 1
    """Smallest loss scale."""
    growth_interval: Count = 1000
    """Number of consecutive steps without overflow after which the loss scale grows."""


class GradScalerConfig(Section):
    """Settings of the loss scale for ``model.dtype = "torch.float16"``. With other dtypes, the loss scale is 1."""

    fp16: FP16Config = FP16Config()
    """Settings of the dynamic loss scale for float16."""
    growth_factor: MoreThanOne = 2
    """Factor by which the loss scale grows."""
    backoff_factor: Shrinking = 0.5
    """Factor by which the loss scale is multiplied after an overflow; see ``hysteresis``."""
    max_scale: Positive = 2**24
    """Largest loss scale."""
    hysteresis: Count = 2
    """Number of overflows after which the loss scale is lowered, counted since it last grew. Every further overflow
    lowers it again."""


class LossConfig(Section):
    """Settings of the loss. Tokens with label −100 are left out."""

    # The loss of accumulated gradients should be that of one large batch, hence not the mean of means.
    average: Literal["token", "micro_batch"] = "token"
    """Average that training minimises and logs as ``loss``. ``token``: mean over the valid tokens of the global batch.
    ``micro_batch``: mean over the micro-batches of the global batch of the mean over the valid tokens of each, as in
    older versions of InternEvo, so that a token in a micro-batch with few valid tokens counts more. Micro-batches
    without valid tokens are left out. Neither depends on the parallel layout. ``loss_from_metric``, ``perplexity`` and
    validation losses are means over tokens with both."""
    label_smoothing: Decay = 0.0
    """Probability mass spread evenly over the vocabulary (arXiv 1512.00567)."""
    moe_loss_coeff: NonNegative = 0.1
    """Weight of the load-balancing loss of mixture-of-experts routers."""
    op_type: Literal["auto", "py_vocab_parallel", "flash_vocab_parallel", "torch_naive", "py_naive"] = "auto"
    """Accepted for older configs, without effect: the same chunked kernel computes the loss for every value."""
