"""``ckpt``, ``monitor``: what surrounds training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from internlm.config.schema.base import Count, CountOrZero, Section


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
