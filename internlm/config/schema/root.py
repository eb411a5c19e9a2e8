"""``ckpt``, ``monitor``: what surrounds training.

The whole config.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from internlm.config.schema.data import DataConfig
from internlm.config.schema.fields import Count, CountOrZero, Section
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


class LoadInfo(Section):
    """``ckpt.load_ckpt_info``: where to start from."""

    path: str
    """Checkpoint: ``local:FOLDER`` or a plain path."""
    content: Annotated[
        tuple[Literal["model", "sampler", "optimizer", "scheduler", "all"], ...], Field(strict=False, min_length=1)
    ] = ("all",)
    """What to load."""
    ckpt_type: Literal["internevo", "hf", "llama"] = "internevo"
    """Format of the checkpoint."""


class CkptConfig(Section):
    """``ckpt``: saving and resuming."""

    enable_save_ckpt: bool = False
    """Save at all."""
    save_ckpt_folder: str | None = None
    """Where to: ``local:FOLDER`` or a plain path."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; the last step is always saved."""
    load_ckpt_info: LoadInfo | None = None
    """What to start from where nothing is resumed."""
    auto_resume: bool = True
    """Continue from the newest complete checkpoint in save_ckpt_folder."""
    async_upload: bool = False
    """Write in the background."""
    async_upload_tmp_folder: str | None = None
    """Local folder for that."""
    oss_snapshot_freq: CountOrZero = 0
    """Steps between snapshots; 0: none."""
    stop_file_path: str | None = None
    """File whose number asks the run to save, and to stop."""
    enable_internevo2hf_ckpt: bool = False
    """Save in the Hugging Face format too."""


class AlertConfig(Section):
    """``monitor.alert``: who is told."""

    enable_feishu_alert: bool = False
    """Send alerts to the webhook."""
    feishu_alert_address: str | None = None
    """Webhook that takes alerts."""
    light_monitor_address: str | None = None
    """Webhook that takes heartbeats."""
    alert_file_path: str | None = None
    """File that alerts are appended to."""


class TensorboardConfig(Section):
    """``monitor.tensorboard``."""

    queue_max_length: Count = 10
    """Scalars held back before they are written."""


class MonitorConfig(Section):
    """``monitor``: alerts and TensorBoard."""

    alert: AlertConfig = AlertConfig()
    """Alerts."""
    tensorboard: TensorboardConfig = TensorboardConfig()
    """TensorBoard's writer."""


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
