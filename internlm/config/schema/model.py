"""``model``: the shape of the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from internlm.config.schema.fields import Count, CountOrZero, Fraction, NonNegative, Positive, Section

Dtype = Literal["torch.float16", "torch.half", "torch.bfloat16", "torch.float32", "torch.tf32", "torch.float64"]


class ModelConfig(Section):
    """``model``: sizes, norms, biases, rotary embedding, initialisation."""

    num_layers: Count
    """Decoder blocks."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads."""
    vocab_size: Count
    """Tokens known to embedding and head."""
    num_kv_attention_heads: Count | None = None
    """Key/value heads; absent: as many as query heads."""
    head_dim: Count | None = None
    """Width of one head; absent: hidden_size ÷ num_attention_heads."""
    mlp_ratio: Positive = 8 / 3
    """Intermediate width ÷ hidden_size, before rounding up to ``multiple_of``."""
    multiple_of: Count = 256
    """The intermediate width is rounded up to a multiple of this."""
    max_position_embeddings: Count = 2048
    """Positions the model was made for; dynamic NTK starts beyond it."""
    num_chunks: Count = 1
    """Model chunks per pipeline stage; over 1 makes 1F1B interleaved. ZBV has 2."""
    checkpoint: bool | Fraction | Literal["selective"] = False
    """Activation recompute: True (all layers), False (none) or the fraction of layers, spread over the model: of 0.5
    every second; ``selective``: of every layer what is no product with a weight."""
    cpu_offloading: CountOrZero = 0
    """Of how many layers of each chunk, from its first on, activations wait for backward in host memory."""
    drop_rate: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Dropout of what embedding, attention and feed-forward give to the residual stream."""
    dropout_selective_checkpoint: bool = True
    """Draw the masks of dropout again in backward; False: keep them, a byte for each element."""
    compile: bool = False
    """Have torch.compile compile each block."""
    dtype: Dtype | None = None
    """Type of parameters and activations; absent: bfloat16 on CUDA, float32 on CPU. tf32 is float32 with TF32 matrix
    products allowed."""
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of normalisation."""
    layer_norm_epsilon: Positive = 1e-5
    """Added to the variance."""
    apply_post_layer_norm: bool = False
    """Normalise after the residual sum instead of before the sub-layer."""
    no_bias: bool | None = None
    """True: no bias anywhere; absent: as the model type has it."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection; absent: as the model type has it."""
    o_bias: bool | None = None
    """Bias of the attention output projection; absent: as the model type has it."""
    mlp_bias: bool | None = None
    """Biases of the feed-forward projections; absent: as the model type has it."""
    residual_in_fp32: bool = False
    """Keep the residual stream in float32."""
    use_flash_attn: bool = True
    """Allow the flash-attn kernels where they are installed; other kernels serve elsewhere."""
    attention_backend: Literal["auto", "flash", "varlen", "sdpa", "blocked", "reference"] = "auto"
    """Attention kernel; ``auto`` takes the best one there is, any other must be available."""
    parallel_output: bool = True
    """Keep logits split over the tensor group."""
    embed_split_hidden: bool = True
    """Split the embedding over hidden units rather than over the vocabulary."""
    embed_grad_scale: Positive = 1.0
    """Factor on the gradient that flows into the embedding (GLM-130B, arXiv 2210.02414)."""
    tie_word_embeddings: bool = False
    """Use the embedding as the head's weight."""
    qk_interleaved: bool | None = None
    """Rotary layout: True pairs neighbours, False pairs halves; absent: as the model type has it."""
    rope_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    use_dynamic_ntk_rope: bool = False
    """Raise the base with the sequence length beyond ``max_position_embeddings``."""
    rope_scaling_factor: Positive = 1.0
    """Linear scaling of positions, or the factor of dynamic NTK."""
    use_sliding_window: bool = False
    """Attend to the last ``sliding_window`` tokens only."""
    sliding_window: Count | None = None
    """Width of the window in tokens."""
    mlp_layer_fusion: bool = True
    """Gate and up projection as one product."""
    enable_qkv_fusion: bool = True
    """Query, key and value projection as one product."""
    norm_head: bool = False
    """Normalise the head's rows."""
    use_scaled_init: bool = True
    """Divide the deviation of output projections by √(2 · num_layers) (GPT-2)."""
    embedding_init_std: NonNegative = 0.02
    """Standard deviation of the embedding at the start."""
    attn_wqkv_init_std: NonNegative = 0.02
    """Standard deviation of query, key and value projections at the start."""
    attn_other_init_std: NonNegative = 0.02
    """Standard deviation of attention output projections at the start."""
    ffn_uplayer_init_std: NonNegative = 0.02
    """Standard deviation of gate and up projections at the start."""
    ffn_other_init_std: NonNegative = 0.02
    """Standard deviation of down projections at the start."""
    out_head_init_std: NonNegative = 0.02
    """Standard deviation of the head at the start."""
    num_experts: Count = 1
    """Experts per layer; 1: a dense model."""
    top_k: Count = 2
    """Experts a token is sent to."""
    num_shared_experts: CountOrZero = 0
    """Experts that see every token."""
    moe_type: Literal["GShard", "Dropless"] = "GShard"
    """Kind of mixture layer."""
    moe_layer_kwargs: dict[str, bool | int | float | str | None] = Field(default={})
    """Settings of the mixture layer."""

    @property
    def recomputed_layers(self) -> int:
        """Layers of which nothing but the input is kept for backward."""
        return 0 if self.checkpoint == "selective" else int(self.checkpoint * self.num_layers)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_attention_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward layer: hidden · ratio, rounded up to ``multiple_of``."""
        width = int(self.hidden_size * self.mlp_ratio)
        return -(-width // self.multiple_of) * self.multiple_of
