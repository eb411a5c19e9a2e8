"""Parameters of a model, by formula; biases and norms, which are few, are left out."""

from __future__ import annotations

from internlm.config.schema import ModelConfig


def layer_parameters(model: ModelConfig) -> int:
    """Of one block: query, key, value and output projections, gate, up and down projections."""
    queries, keys = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    return model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size)


def table_parameters(model: ModelConfig) -> int:
    """Of the embedding, and of the head."""
    return model.vocab_size * model.hidden_size
