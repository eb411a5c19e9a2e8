"""The whole config."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from internlm.config.schema.base import Section
from internlm.config.schema.data import DataConfig
from internlm.config.schema.model import ModelConfig
from internlm.config.schema.optim import (
    AdamConfig,
    Beta2SchedulerConfig,
    GradScalerConfig,
    HybridZeroConfig,
    LossConfig,
    LRSchedulerConfig,
    OptimizerConfig,
)
from internlm.config.schema.parallel import ParallelConfig
from internlm.config.schema.services import CkptConfig, MonitorConfig


class Config(Section):
    """A resolved, validated, frozen config. Made by :func:`internlm.config.load_config`."""

    model: ModelConfig
    """Shape of the network."""
    data: DataConfig
    """What is read."""
    adam: AdamConfig
    """Learning rate, betas, weight decay."""
    JOB_NAME: str = "internlm"
    """Name of the run; its records lie under ``RUN/{JOB_NAME}/``."""
    model_type: str = "INTERNLM"
    """Registered model type."""
    parallel: ParallelConfig = ParallelConfig()
    """How many processes share what."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How parameters are updated."""
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    """Learning rate over the steps."""
    beta2_scheduler: Beta2SchedulerConfig = Beta2SchedulerConfig()
    """beta2 over the steps."""
    hybrid_zero_optimizer: HybridZeroConfig = HybridZeroConfig()
    """Buckets, overlap, clipping."""
    grad_scaler: GradScalerConfig = GradScalerConfig()
    """Loss scale of float16."""
    loss: LossConfig = LossConfig()
    """The loss."""
    ckpt: CkptConfig = CkptConfig()
    """Saving and resuming."""
    monitor: MonitorConfig = MonitorConfig()
    """Alerts and TensorBoard."""
    use_fp32_norm: bool = False
    """Keep the weights of norms in float32, and compute with them so."""
    reduce_comm_dtype: Literal["torch.float32", "torch.bfloat16", "torch.float16"] | None = None
    """Type in which gradients are reduced; absent: the type of the gradient buffer."""
    cudnn_deterministic: bool = False
    """Deterministic cuDNN kernels."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its kernels first."""
    enable_tb: bool = True
    """Write TensorBoard records."""
    tensorboard_folder: str | None = None
    """Where to; absent: beside the run's other records."""
    log_folder: str = "RUN"
    """Folder of all runs' records."""

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """The config in the file ``path``, resolved as by :func:`internlm.config.load_config`."""
        from internlm.config import load_config  # which needs this class

        return load_config(path, overrides)
