"""The ``model`` section: shape, kernels and initial values of the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from internlm.config.schema.fields import (
    Count,
    CountOrZero,
    Fraction,
    Items,
    NonNegative,
    Positive,
    Section,
    floor_share,
)

Dtype = Literal["torch.float16", "torch.half", "torch.bfloat16", "torch.float32", "torch.tf32", "torch.float64"]
NormType = Literal["rmsnorm", "layernorm"]
QKNorm = Literal["none", "head", "projection"]
Activation = Literal["silu", "gelu_tanh"]
AttentionBackend = Literal["auto", "flash", "varlen", "sdpa", "blocked", "reference"]


class RopeScalingConfig(Section):
    """Scaling of the rotary frequencies for contexts longer than in the first stage of training."""

    type: Literal["llama3", "yarn"]
    """``llama3``: divide low frequencies by ``factor`` and keep high ones (Llama 3.1, arXiv 2407.21783); ``yarn``: the
    same with another transition, and larger scores (arXiv 2309.00071)."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Ratio of the new to the original context length."""
    original_max_position: Count
    """Context length before scaling, in tokens."""
    low_freq_factor: Positive = 1.0
    """``llama3``: frequencies with fewer rotations than this over the original context are divided by ``factor``."""
    high_freq_factor: Positive = 4.0
    """``llama3``: frequencies with more rotations than this over the original context are kept."""
    beta_fast: Positive = 32.0
    """``yarn``: frequencies with more rotations than this over the original context are kept."""
    beta_slow: Positive = 1.0
    """``yarn``: frequencies with fewer rotations than this over the original context are divided by ``factor``."""
    attention_factor: Positive | None = None
    """``yarn``: factor of rotated queries and of rotated keys. Default: 0.1 · ln(``factor``) + 1."""


LoraTarget = Literal["wqkv", "wo", "w13", "w2"]


class LoraConfig(Section):
    """Low-rank adapters of linears (LoRA, arXiv 2106.09685): only they are trained, all else is frozen."""

    rank: Count
    """Rank of the adapters."""
    alpha: Positive = 16.0
    """The output of an adapter is multiplied by ``alpha`` ÷ ``rank``."""
    targets: Annotated[Items[LoraTarget], Field(min_length=1)] = ("wqkv", "wo", "w13", "w2")
    """Linears of each block that have an adapter: the projections of attention, ``wqkv`` and ``wo``, and of the
    feed-forward layer, ``w13`` (gate and up) and ``w2``. Where these are not fused, each of their weights has one."""


class HFModuleConfig(Section):
    """Module of Hugging Face to train unmodified, with ``model_type="hf"``: its classes and the modules they are in."""

    mod: str
    """Python module of the model's class, such as ``transformers.models.llama.modeling_llama``."""
    mod_cls: str
    """Class of the model, which returns logits, such as ``LlamaForCausalLM``."""
    cfg: str
    """Python module of the config's class, such as ``transformers.models.llama.configuration_llama``."""
    cfg_cls: str
    """Class of the config, such as ``LlamaConfig``."""
    cfg_extra_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the config's class; the others have the defaults of the class."""


class ModelConfig(Section):
    """Settings of the model. ``model_type`` may have other defaults; ``internlm config`` prints what applies."""

    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Number of decoder blocks in the whole model."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Number of query heads."""
    vocab_size: Count
    """Number of vocabulary entries. All token ids in the data must be less than this number."""
    num_kv_attention_heads: Count | None = None
    """Number of key/value heads, for grouped-query attention (arXiv 2305.13245). Default: ``num_attention_heads``."""
    head_dim: Count | None = None
    """Width of one attention head. Default: ``hidden_size`` ÷ ``num_attention_heads``."""
    # SwiGLU has three matrices, an MLP two: a ratio of 8/3 gives it the size of an MLP of ratio 4 (arXiv 2002.05202).
    mlp_ratio: Positive = 8 / 3
    """Feed-forward width ÷ ``hidden_size``, before the width is rounded up to a multiple of ``multiple_of``."""
    multiple_of: Count = 256
    """The feed-forward width is rounded up to a multiple of this number."""
    max_position_embeddings: Count = 2048
    """Context length that the model is designed for, in tokens. Dynamic NTK scaling starts beyond it."""
    num_chunks: Count = 1
    """Number of model chunks (virtual stages) per pipeline rank. More than 1 makes 1F1B interleaved; ZBV needs 2."""
    # bool is listed because pydantic, in strict mode, accepts True neither as a fraction nor as a string.
    checkpoint: bool | Fraction | Literal["selective"] = False
    """Activation checkpointing (recompute). True: all blocks; False: none; a fraction: that share of the blocks,
    spread evenly (0.5: every second block); ``selective``: in every block, save the outputs of the weight GEMMs and
    recompute the rest. Recomputing all blocks costs about a third more compute."""
    cpu_offloading: CountOrZero = 0
    """Number of leading blocks of each model chunk whose saved activations are offloaded to host memory until the
    backward pass. Saves device memory, at the cost of copying each activation to the host and back."""
    drop_rate: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Dropout probability on the outputs of embedding, attention and feed-forward layers."""
    dropout_selective_checkpoint: bool = True
    """True: recompute dropout masks in the backward pass. False: save them, one byte per element."""
    compile: bool = False
    """Compile each block with ``torch.compile``. The first steps take longer."""
    dtype: Dtype | None = None
    """Dtype of parameters and activations. Default: ``torch.bfloat16`` on CUDA, ``torch.float32`` on the CPU.
    ``torch.tf32`` is float32 with TF32 matmuls allowed; ``torch.float16`` uses the loss scale of
    ``grad_scaler``."""
    norm_type: NormType = "rmsnorm"
    """Normalisation: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450)."""
    layer_norm_epsilon: Positive = 1e-5
    """Epsilon, added to the variance (RMSNorm: the mean square) before the square root."""
    apply_post_layer_norm: bool = False
    """Normalise after each residual sum (post-norm) instead of before each sub-layer (pre-norm)."""
    qk_norm: QKNorm = "none"
    """Normalise queries and keys before rotary embedding (arXiv 2302.05442): ``head``, each head by itself with a
    weight that all heads share; ``projection``, all heads of a token together, each element with its own weight."""
    activation: Activation = "silu"
    """Activation of the gate in the feed-forward layer: ``silu`` (SwiGLU), or ``gelu_tanh`` (GeGLU), the tanh
    approximation of GELU (arXiv 2002.05202)."""
    no_bias: bool | None = None
    """Omit the biases of all projections, whatever ``qkv_bias``, ``o_bias`` and ``mlp_bias`` are. False or None: these
    three keys decide."""
    qkv_bias: bool | None = None
    """Whether the query/key/value projection has a bias. Default: set by the model type."""
    o_bias: bool | None = None
    """Whether the output projection of attention has a bias. Default: set by the model type."""
    mlp_bias: bool | None = None
    """Whether the feed-forward projections have biases. Default: set by the model type."""
    residual_in_fp32: bool = False
    """Keep the residual stream in float32."""
    use_flash_attn: bool = True
    """Allow the flash-attn kernels. If they are not allowed or not installed, other kernels are used."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel. ``auto`` chooses the fastest available kernel. A kernel chosen by name is refused before the
    run starts if it does not support the device or the dtype, or is not installed."""
    parallel_output: bool = True
    """Keep the logits split over the tensor group instead of gathering them for the loss."""
    embed_split_hidden: bool = True
    """True: split the embedding over the hidden dimension. False: split it over the vocabulary."""
    embed_grad_scale: Positive = 1.0
    """Factor on the gradient of the embedding. Less than 1 damps early instability (GLM-130B, arXiv 2210.02414)."""
    tie_word_embeddings: bool = False
    """Use the weight of the embedding as the weight of the output head."""
    qk_interleaved: bool | None = None
    """Layout of the rotary embedding. True: rotate neighbouring elements as pairs; False: pair the two halves of a
    head. Default: set by the model type. A model trained with one layout gives wrong results with the other."""
    rope_base: Positive = 10000.0
    """Base θ of the rotary frequencies (RoPE, arXiv 2104.09864)."""
    use_dynamic_ntk_rope: bool = False
    """Increase the rotary base for sequences longer than ``max_position_embeddings`` (dynamic NTK scaling). Each packed
    sequence has the base of its own length."""
    rope_scaling_factor: Positive = 1.0
    """Divisor of the positions (linear scaling, arXiv 2306.15595). With ``use_dynamic_ntk_rope``: factor of the
    dynamic NTK scaling."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the rotary frequencies as in Llama 3.1 or YaRN; excludes the two keys before."""
    local_rope_base: Positive | None = None
    """Base θ of the rotary frequencies in layers with a sliding window, whose frequencies are not scaled. Default: as
    in other layers."""
    attention_scale: Positive | None = None
    """Factor of the attention scores. Default: 1 / √``head_dim``."""
    use_sliding_window: bool = False
    """Attend to the last ``sliding_window`` tokens only."""
    sliding_window: Count | None = None
    """Width of the attention window in tokens, the token itself included."""
    global_layers: Items[CountOrZero] | None = None
    """Indices, from 0, of the layers that attend to all tokens in spite of ``use_sliding_window``."""
    mlp_layer_fusion: bool = True
    """Store the gate and up projections as one weight, ``w13``, and compute them as one GEMM. False: as ``w1`` and
    ``w3``, with the same values."""
    enable_qkv_fusion: bool = True
    """Store the query, key and value projections as one weight, ``wqkv``, and compute them as one GEMM. False: as
    ``wq``, ``wk`` and ``wv``, with the same values."""
    norm_head: bool = False
    """Normalise each row of the output head's weight (Baichuan 2, arXiv 2309.10305)."""
    # Makes the initial variance of the residual stream independent of depth.
    use_scaled_init: bool = True
    """Divide the initial standard deviation of output projections by √(2 · ``num_layers``), as GPT-2 does."""
    embedding_init_std: NonNegative = 0.02
    """Initial standard deviation of the embedding."""
    attn_wqkv_init_std: NonNegative = 0.02
    """Initial standard deviation of query, key and value projections."""
    attn_other_init_std: NonNegative = 0.02
    """Initial standard deviation of the output projection of attention."""
    ffn_uplayer_init_std: NonNegative = 0.02
    """Initial standard deviation of gate and up projections."""
    ffn_other_init_std: NonNegative = 0.02
    """Initial standard deviation of the down projection."""
    out_head_init_std: NonNegative = 0.02
    """Initial standard deviation of the output head."""
    hf: HFModuleConfig | None = None
    """Module of Hugging Face, for ``model_type="hf"``."""
    lora: LoraConfig | None = None
    """Adapters for fine-tuning a trained model, whose weights ``ckpt.load_ckpt_info`` loads."""
    num_experts: Count = 1
    """Number of experts per mixture-of-experts layer. 1: a dense model."""
    top_k: Count = 2
    """Number of experts that each token is routed to."""
    num_shared_experts: CountOrZero = 0
    """Number of experts that process every token, in addition to the routed experts."""
    moe_type: Literal["GShard", "Dropless"] = "GShard"
    """Mixture-of-experts layer: ``GShard`` drops tokens beyond an expert's capacity, ``Dropless`` drops none."""
    moe_layer_kwargs: dict[str, bool | int | float | str | None] = Field(default={})
    """Dict of settings of the mixture-of-experts layer that have no config key."""

    @property
    def recomputed_layers(self) -> int:
        """Number of fully recomputed blocks, which save only their input for the backward pass."""
        # True and False are the ratios 1 and 0: all and none.
        return 0 if self.checkpoint == "selective" else floor_share(self.checkpoint, self.num_layers)

    def recomputes(self, layer: int) -> bool:
        """Return whether block ``layer`` of the whole model, counted from 0, is recomputed in the backward pass.

        Recomputed blocks are spread evenly, so that each pipeline stage gets its share.
        """
        return layer * self.recomputed_layers % self.num_layers < self.recomputed_layers

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, with the default applied."""
        return self.num_kv_attention_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head, with the default applied."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Feed-forward width: ``hidden_size`` · ``mlp_ratio``, rounded up to a multiple of ``multiple_of``."""
        width = int(self.hidden_size * self.mlp_ratio)
        # Floor division of the negated width rounds up. Multiples of 256 suit the tiles of GEMM kernels.
        return -(-width // self.multiple_of) * self.multiple_of

    def window(self, layer: int) -> int | None:
        """Return the attention window of block ``layer`` in tokens; None: the block attends to all tokens."""
        is_local = self.use_sliding_window and layer not in (self.global_layers or ())
        return self.sliding_window if is_local else None
