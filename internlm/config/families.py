"""Model families: the structure of their blocks, and defaults of the keys that a config leaves out.

A family is a row of :data:`FAMILIES`. Its structure is fixed; its keys are defaults, which a config may override. This
is plain data without torch, so that configs are resolved and costs are computed before anything else is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from internlm.config.schema.model import ModelConfig
from internlm.utils.registry import MODEL_INITIALIZER

#: Where a block normalises: the input of each sub-layer, its output, or both.
NormPlacement = Literal["input", "output", "both"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Structure and default keys of a model family."""

    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Defaults of keys of the ``model`` section."""
    norms: NormPlacement = "input"
    norm_offset: float = 0.0
    """Number added to the weight of each norm; 1: the weight is stored as a difference from 1."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by √hidden_size."""
    scales_init_by_layer: bool = False
    """Whether output projections of layer l, from 1, have the initial deviation of a model of l layers."""
    global_every: int | None = None
    """With a sliding window, every layer of this number attends to all tokens; None: no layer does."""

    @property
    def structure(self) -> Family:
        """The family without what its defaults and initial values are: what a checkpoint does not say itself."""
        return replace(self, keys={}, scales_init_by_layer=False, global_every=None)

    def complete(self, model: ModelConfig) -> ModelConfig:
        """Return ``model`` with the defaults of the family for the keys that it does not set."""
        return model.model_copy(update=self.missing({key: getattr(model, key) for key in model.model_fields_set}))

    def missing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that a ``model`` section ``given`` does not set, with the defaults of the family."""
        # None stands for a key that is not given.
        defaults = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_interleaved": False, **self.keys}
        layers = given.get("num_layers")
        if self.global_every and type(layers) is int:  # the schema, which is checked next, names another type
            defaults["global_layers"] = tuple(range(self.global_every - 1, layers, self.global_every))
        return {key: value for key, value in defaults.items() if given.get(key) is None}


def is_replaced(name: str) -> bool:
    """Return whether a user's own model is registered under the name of a built-in family, whose defaults it lacks."""
    return name in MODEL_INITIALIZER and not hasattr(MODEL_INITIALIZER.get_module(name), "family")


_QWEN = {"rope_base": 1e6, "layer_norm_epsilon": 1e-6}
_GEMMA = {"activation": "gelu_tanh", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-6}
#: Deviations of InternLM, as published.
_INTERNLM_INIT = {
    **dict.fromkeys(("embedding_init_std", "out_head_init_std"), 0.0052),
    **dict.fromkeys(("attn_wqkv_init_std", "attn_other_init_std"), 0.006),
    **dict.fromkeys(("ffn_uplayer_init_std", "ffn_other_init_std"), 0.006),
}
_INTERNLM2 = Family()  # arXiv 2403.17297: grouped queries, fused wqkv, no biases
_LLAMA2 = Family()  # arXiv 2307.09288

FAMILIES: Mapping[str, Family] = {
    # arXiv 2403.17297, section 2: the first generation
    "INTERNLM": Family(keys={"qkv_bias": True, "o_bias": True, **_INTERNLM_INIT}, scales_init_by_layer=True),
    "INTERNLM2": _INTERNLM2,
    "INTERNLM2_PUBLIC": _INTERNLM2,
    "INTERNLM3": Family(keys={"rope_base": 5e7}),
    "LLAMA": _LLAMA2,  # as users call LLAMA2
    "LLAMA2": _LLAMA2,
    "LLAMA3": Family(keys={"rope_base": 5e5}),  # arXiv 2407.21783
    "MISTRAL": Family(keys={"use_sliding_window": True, "sliding_window": 4096}),  # arXiv 2310.06825
    "QWEN2": Family(keys={"qkv_bias": True, **_QWEN}),  # arXiv 2407.10671
    "QWEN3": Family(keys={"qk_norm": "head", **_QWEN}),  # arXiv 2505.09388
    "BAICHUAN2": Family(keys={"norm_head": True, "layer_norm_epsilon": 1e-6}),  # arXiv 2309.10305
    "OLMO2": Family(  # arXiv 2501.00656
        keys={"qk_norm": "projection", "rope_base": 5e5, "layer_norm_epsilon": 1e-6}, norms="output"
    ),
    "GEMMA": Family(keys=_GEMMA, norm_offset=1.0, scales_embedding=True),  # arXiv 2403.08295
    "GEMMA3": Family(  # arXiv 2503.19786
        keys={
            **_GEMMA,
            "qk_norm": "head",
            "rope_base": 1e6,
            "local_rope_base": 1e4,
            "use_sliding_window": True,
            "sliding_window": 512,
        },
        norms="both",
        norm_offset=1.0,
        scales_embedding=True,
        global_every=6,
    ),
}
