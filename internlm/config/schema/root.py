"""The whole config, and the sections for a run's input and output: ``data``, ``ckpt`` and ``monitor``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from internlm.config.schema.fields import (
    Count,
    CountOrZero,
    Items,
    NonNegative,
    PathText,
    Positive,
    Section,
    WebAddress,
)
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

CheckpointContent = Literal["model", "sampler", "optimizer", "scheduler", "all"]


class WeightChange(Section):
    """Entry of ``data.weight_changes``: the shares of the dataset types from a step on."""

    step: Count
    """First step with these weights."""
    weights: Annotated[dict[str, NonNegative], Field(min_length=1)]
    """Shares of the dataset types in the tokens, as in ``data.weights``."""


class DataConfig(Section):
    """Settings of datasets and batches. A step reads ``micro_num`` micro-batches on each data-parallel rank."""

    seq_len: Annotated[int, Field(ge=2)]
    """Sequence length in tokens. Longer samples are split or, if ``use_packed_dataset`` is False, truncated. At least
    2, since the first token is never a label."""
    micro_bsz: Count
    """Number of sequences per micro-batch."""
    total_steps: Count
    """Number of optimizer steps of the run."""
    type: Literal["tokenized", "streaming", "megatron", "mocked"] = "tokenized"
    """Form of the data. ``tokenized``: token files, or random data without ``train_folder``. ``streaming``: text that
    is tokenized during training. ``megatron``: Megatron-LM's files. ``mocked``: batches recorded elsewhere."""
    micro_num: Count = 1
    """Number of micro-batches per step on each data-parallel rank (gradient accumulation)."""
    global_batch: Count | None = None
    """Number of sequences per step on all data-parallel ranks together, a multiple of ``micro_bsz``. ``micro_num`` then
    follows from it, and a step has the same samples on any number of ranks; a rank with fewer of them has padding."""
    valid_micro_num: Count | None = None
    """Number of micro-batches per validation batch. Default: ``micro_num``."""
    valid_every: CountOrZero = 0
    """Steps between validations. The last step is followed by a validation too. 0: never validate."""
    valid_max_batches: Count | None = None
    """Largest number of validation batches per dataset type. Default: all."""
    pack_sample_into_one: bool = False
    """Attend across samples within each window of ``seq_len`` tokens. False: attend within one sample only."""
    use_packed_dataset: bool = True
    """Pack samples without padding into micro-batches of ``seq_len`` · ``micro_bsz`` tokens. False: one sample per
    sequence, truncated or padded to ``seq_len``."""
    pack: Literal["stream", "best_fit"] = "stream"
    """Division of samples among micro-batches. ``stream``: one after the other, and cut where a micro-batch ends.
    ``best_fit``: no sample of at most ``seq_len`` tokens is cut, and a little padding is left (arXiv 2404.10830)."""
    weights: dict[str, NonNegative] = Field(default_factory=dict)
    """Shares of the dataset types in the tokens, such as ``dict(en=0.7, code=0.3)``; types that are not named are not
    used. Empty: all samples once in each epoch. A list of ``(type, weight, largest number of epochs or None)`` sets
    ``max_epochs`` too, a list of ``(step, weights)`` sets ``weight_changes``."""
    max_epochs: dict[str, Positive] = Field(default_factory=dict)
    """Largest number of epochs of a dataset type, with ``weights``; a run that needs more is refused."""
    weight_changes: Items[WeightChange] = ()
    """Other weights, each from a step on."""
    skip_batches: str = ""
    """Batches to skip, counted from 0: ``"a-b,c"`` skips a to b, both included, and c."""
    rampup_batch_size: str = ""
    """Batch-size ramp-up, ``"start increment every"``: a step has ``start`` micro-batches at first and
    ``increment`` more after each ``every`` steps, up to ``micro_num``. With ``global_batch``: sequences, up to it."""
    min_length: CountOrZero = 0
    """Minimum number of tokens in a sample; shorter samples are dropped. Random data is not affected."""
    train_folder: PathText | None = None
    """Folder of token files to train on, or one without its suffix, or folder of streamed texts; each sub-folder is a
    dataset type. None: random data."""
    valid_folder: PathText | None = None
    """Folder of files to validate on. None: no validation, or random data if ``train_folder`` is None too."""
    fingerprint: Literal["stat", "sampled", "full"] = "sampled"
    """How changes of the training data are noticed when a run resumes. ``stat``: names and lengths of samples.
    ``sampled``: some tokens of each file too. ``full``: every byte, and reads during training are compared as well."""
    cache_folder: PathText | None = None
    """Local folder for copies of remote files, which runs may share. Needed if ``train_folder`` or ``valid_folder`` is
    an address such as ``s3://BUCKET/FOLDER``."""
    cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    """GiB that the copies in ``cache_folder`` may take up; those that were opened longest ago are deleted first."""
    fixed_random_dataset_seqlen: bool = False
    """Random data: make every sample exactly ``seq_len`` tokens long."""
    empty_cache_and_diag_interval: CountOrZero = 0
    """Interval in steps at which cached device memory is released and slow ranks are reported. 0: never."""
    diag_outlier_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1
    """Report a rank as slow if its forward and backward passes take more than this multiple of the mean over ranks."""
    use_shm: bool = False
    """Store one index of the data files per machine, in shared memory."""
    shm_path: PathText = "/dev/shm/metacache"
    """Folder in shared memory that holds the index."""
    # Threads: parsing a row takes about a millisecond, and threads need no second copy of torch.
    num_worker: CountOrZero = 4
    """Number of threads that read batches ahead. 0: read in the training loop."""
    tokenizer_path: PathText | None = None
    """Tokenizer of the data: a sentencepiece ``.model`` or a Hugging Face tokenizer folder, all of whose ids are below
    ``model.vocab_size``. With tokenized data, it is used only for bits per byte in validations and to show texts."""
    content_name: str = "text"
    """Column of streamed data that holds the text."""
    subset: str | None = None
    """Sub-set of streamed data, as the ``README.md`` of its folder names it. None: all, each as a dataset type."""
    train_split: str = "train"
    """Split of ``train_folder``, if the paths or the ``README.md`` of streamed data name splits."""
    valid_split: str = "validation"
    """Split of ``valid_folder``, if the paths or the ``README.md`` of streamed data name splits."""
    stream_shards: Annotated[int, Field(ge=1, le=1 << 15)] | None = None
    """Number of parts that streamed data is dealt to, each packed on its own: row n of the run is from part n modulo
    this number. Default: the micro-batches of a step on all ranks, so that a rank always reads the same parts."""
    shuffle_buffer: CountOrZero = 1 << 14
    """Number of documents of streamed data that are shuffled together, over all parts."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What a row of streamed data that cannot be read does, such as invalid JSON: end the run, or be left out and
    counted. Empty texts are always left out."""

    @property
    def packed_length(self) -> int:
        """Number of tokens in one micro-batch: ``seq_len`` · ``micro_bsz``."""
        return self.seq_len * self.micro_bsz

    def step_rows(self, data_size: int) -> int:
        """Return the number of rows (micro-batches) of a step on all ``data_size`` data-parallel ranks together."""
        return self.micro_num * data_size if self.global_batch is None else self.global_batch // self.micro_bsz

    @property
    def gradient_accumulation(self) -> int:
        """Number of micro-batches of a step, by its older name."""
        return self.micro_num


class LoadInfo(Section):
    """Checkpoint that a run starts from: its path, the parts to load, and its format."""

    path: PathText
    """Checkpoint folder: ``local:FOLDER``, a plain path or ``s3://BUCKET/FOLDER``; of other formats, a local one."""
    content: Annotated[Items[CheckpointContent], Field(min_length=1)] = ("all",)
    """Parts of the checkpoint to load. ``("model",)`` starts a new run from the checkpoint's parameters."""
    ckpt_type: Literal["internevo", "hf", "llama"] = "internevo"
    """Format of the checkpoint: one that a run saved (``internevo``), a Hugging Face folder with safetensors files
    (``hf``) or a folder of Meta's releases (``llama``). Of the last two, only the model can be loaded."""


class CkptConfig(Section):
    """Settings for saving checkpoints and resuming from them."""

    enable_save_ckpt: bool = False
    """Save checkpoints. Default: True if ``save_ckpt_folder`` and ``checkpoint_every`` are given, else False."""
    save_ckpt_folder: PathText | None = None
    """Folder that checkpoints are saved in: ``local:FOLDER``, a plain path or ``s3://BUCKET/FOLDER``."""
    checkpoint_every: CountOrZero | None = None
    """Steps between checkpoints. The last step is always saved. 0: save only the last step."""
    load_ckpt_info: LoadInfo | None = None
    """Checkpoint to start from if there is no checkpoint to resume from. Ignored if its ``path`` is None, or ends in
    the placeholder ``xxxx``."""
    auto_resume: bool = True
    """Continue from the newest complete checkpoint in ``save_ckpt_folder``."""
    keep_last: Count | None = None
    """Number of the newest checkpoints to keep; older ones are deleted once a new one has been read back. None: keep
    all."""
    keep_every: Count | None = None
    """Keep also the checkpoints whose step is a multiple of this number. Needs ``keep_last``."""
    allow_model_changes: bool = False
    """Load parameters even if the config changes what the model computes from them, such as by ``model.rope_base`` for
    fine-tuning with longer sequences. False: such a checkpoint is refused."""
    allow_data_changes: bool = False
    """Read on from the saved row even if the training data, their mixture, their packing or the seed has changed since
    the checkpoint was saved. False: such a checkpoint is refused."""
    async_upload: bool = False
    """Write checkpoints in the background: a step only waits while this rank's part is copied to host memory."""
    async_upload_tmp_folder: PathText | None = None
    """Local folder that holds checkpoints until they are uploaded to ``save_ckpt_folder``. Not used: host memory holds
    them."""
    oss_snapshot_freq: CountOrZero = 0
    """Steps between snapshots, which are checkpoints that two folders hold in turns. 0: no snapshots."""
    stop_file_path: PathText | None = None
    """Path of a file polled for a step number: N saves and stops after step N, -N saves and goes on. It is read on rank
    0, and may appear and change during the run."""
    enable_internevo2hf_ckpt: bool = False
    """Write the checkpoint of the last step also as a Hugging Face folder, ``step-N-hf`` beside ``step-N``, with the
    tokenizer at ``data.tokenizer_path``."""


class AlertConfig(Section):
    """Settings of alerts at the start, end or failure of a run."""

    enable_feishu_alert: bool = False
    """Send alerts to the webhook at ``feishu_alert_address``."""
    feishu_alert_address: WebAddress | None = None
    """URL (http or https) of the webhook that alerts are sent to. Redirects are not followed."""
    light_monitor_address: WebAddress | None = None
    """URL of a webhook for heartbeats."""
    alert_file_path: PathText | None = None
    """File that alerts are appended to. None: no file."""


class TensorboardConfig(Section):
    """Settings of the TensorBoard writer."""

    queue_max_length: Count = 10
    """Number of scalars that are buffered before they are written to disk."""


class MonitorConfig(Section):
    """Settings for monitoring: alerts and the TensorBoard writer."""

    alert: AlertConfig = AlertConfig()
    """Settings of alerts at the start, end or failure of a run."""
    tensorboard: TensorboardConfig = TensorboardConfig()
    """Settings of the TensorBoard writer."""


class _ResolvedFromDict(type(Section)):  # type: ignore[misc]  # pydantic's metaclass
    """Metaclass that makes ``Config(a_dict)`` resolve the dict, as existing scripts write it.

    An ``__init__`` of the class would do so too, but would make pydantic validate JSON by the rules for Python objects.
    """

    def __call__(cls, source: Mapping[str, Any] | None = None, /, **keys: Any) -> Any:
        return super().__call__(**keys) if source is None else cls.resolver({**source, **keys})


class Config(Section, metaclass=_ResolvedFromDict):
    """Resolved, validated and frozen config, made by :func:`internlm.config.load_config`.

    ``Config(a_dict)`` and ``Config.from_file(path)`` resolve a dict or a config file.

    Raises:
        ConfigError: The config is invalid; every problem is listed.
    """

    #: Function that resolves a dict or a file. Set by :mod:`internlm.config.resolve`, which needs this class.
    resolver: ClassVar[Callable[[Mapping[str, Any] | str | Path], Config]]
    _variables: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Resolve a config file.

        Raises:
            ConfigError: The config is invalid; every problem is listed.
        """
        return cls.resolver(path)

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the config file: its UPPER_CASE names with plain values, which are no config keys."""
        return dict(self._variables)

    def keys(self) -> list[str]:
        """Return the names of all config keys at the top level, and of the config file's variables."""
        return [*super().keys(), *self._variables]

    if not TYPE_CHECKING:  # a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            # Not for private names: pydantic sets them after it has created the object.
            if not name.startswith("_") and name in self._variables:
                return self._variables[name]
            return super().__getattr__(name)

    model: ModelConfig
    """Settings of the model. ``model_type`` may have other defaults; ``internlm config`` prints what applies."""
    data: DataConfig
    """Settings of datasets and batches. A step reads ``micro_num`` micro-batches on each data-parallel rank."""
    adam: AdamConfig
    """Learning rate, betas and weight decay of all optimizers, named as in AdamW (arXiv 1711.05101)."""
    JOB_NAME: str = "internlm"
    """Name of the run. Its log, metrics and traces are written below ``{log_folder}/{JOB_NAME}/``."""
    model_type: str = "INTERNLM"
    """Registered model type, such as ``INTERNLM2`` or ``LLAMA2``."""
    parallel: ParallelConfig = ParallelConfig()
    """Settings of parallelism. World size = data · pipeline · tensor; isp: also = weight-data · pipeline · weight."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and its settings. Learning rate, betas and weight decay are in ``adam``."""
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    """Settings of the learning-rate schedule: zero for ``init_steps``, linear warm-up, then decay to ``eta_min``."""
    beta2_scheduler: Beta2SchedulerConfig = Beta2SchedulerConfig()
    """Settings of the schedule of AdamW's beta2: max(``init_beta2``, 1 − step^(−c)), constant for c ≤ 0."""
    hybrid_zero_optimizer: HybridZeroConfig = HybridZeroConfig()
    """Settings of the ZeRO optimizer: buckets, overlap of communication and compute, gradient clipping."""
    grad_scaler: GradScalerConfig = GradScalerConfig()
    """Settings of the loss scale for ``model.dtype = "torch.float16"``. With other dtypes, the loss scale is 1."""
    loss: LossConfig = LossConfig()
    """Cross-entropy: its average and smoothing."""
    ckpt: CkptConfig = CkptConfig()
    """Settings for saving checkpoints and resuming from them."""
    monitor: MonitorConfig = MonitorConfig()
    """Settings for monitoring: alerts and the TensorBoard writer."""
    use_fp32_norm: bool = False
    """Keep the weights of norms in float32 and compute norms in float32, whatever ``model.dtype`` is."""
    reduce_comm_dtype: Literal["torch.float32", "torch.bfloat16", "torch.float16"] | None = None
    """Dtype in which gradients are sent and summed. Default: the dtype of the gradient buffer."""
    cudnn_deterministic: bool = False
    """Use deterministic kernels only, so that a run on GPUs can be repeated bit by bit: those of cuDNN and cuBLAS, and
    the slower backward pass of FlashAttention. An operation without one raises an error
    (``torch.use_deterministic_algorithms``)."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its kernels and choose the fastest."""
    enable_tb: bool = True
    """Write TensorBoard records."""
    tensorboard_folder: PathText | None = None
    """Folder of TensorBoard records. Default: ``tensorboards`` in the folder of the run."""
    log_folder: PathText = "RUN"
    """Parent folder of the records of all runs; each run writes to ``{JOB_NAME}/{time of launch}/``, and a resumed run
    to the folder of the run that it continues."""
