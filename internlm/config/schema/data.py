"""``data``: what is read, and how it is cut into batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from internlm.config.schema.fields import Count, CountOrZero, Section


class DataConfig(Section):
    """``data``: a step reads ``micro_num`` rows of ``packed_length`` tokens on each data-parallel rank."""

    seq_len: Annotated[int, Field(ge=2)]
    """Longest piece of a sample, in tokens; at least 2, for the first one is never a label."""
    micro_bsz: Count
    """Sequences per micro-batch."""
    total_steps: Count
    """Optimizer steps of the run."""
    type: Literal["tokenized", "streaming"] = "tokenized"
    """Kind of data set: token files made beforehand, or text tokenized while training."""
    micro_num: Count = 1
    """Micro-batches accumulated into one step, on each data-parallel rank."""
    valid_micro_num: Count | None = None
    """Micro-batches per validation step; absent: micro_num."""
    valid_every: CountOrZero = 0
    """Steps between validations; 0: never."""
    valid_max_batches: Count | None = None
    """Validate on at most so many batches of each type; absent: on all."""
    pack_sample_into_one: bool = False
    """Attend over each whole seq_len window, across samples."""
    use_packed_dataset: bool = True
    """False: one sample a sequence, padded to seq_len."""
    skip_batches: str = ""
    """Batches to leave out, counted from 0: ``"a-b,c"``, inclusive."""
    rampup_batch_size: str = ""
    """``"start increment every"``: micro_num begins at start and grows by increment every so many steps."""
    min_length: CountOrZero = 0
    """Files with fewer samples are dropped."""
    train_folder: str | None = None
    """Folder of ``.bin``/``.meta`` files; None: a random data set."""
    valid_folder: str | None = None
    """The same for validation."""
    fixed_random_dataset_seqlen: bool = False
    """Random data: every sample exactly seq_len tokens long, drawn independently."""
    empty_cache_and_diag_interval: CountOrZero = 0
    """Steps between emptyings of the accelerator's cache; 0: never."""
    diag_outlier_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1
    """A rank slower than the mean by this factor is reported."""
    use_shm: bool = False
    """Keep the index of the data in shared memory."""
    shm_path: str = "/dev/shm/metacache"
    """Folder for that index."""
    num_worker: CountOrZero = 4
    """Threads that read ahead; 0: read when asked."""
    tokenizer_path: str | None = None
    """Tokenizer of the data: a sentencepiece ``.model`` or a Hugging Face tokenizer folder."""
    content_name: str = "text"
    """Column that holds the text of streamed data."""

    @property
    def packed_length(self) -> int:
        """Tokens in one row: seq_len · micro_bsz."""
        return self.seq_len * self.micro_bsz
