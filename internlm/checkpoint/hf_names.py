"""Names of tensors in Hugging Face folders whose architecture is not that of Llama, and fused projections in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from internlm.checkpoint.safetensors_files import StoredTensor
from internlm.checkpoint.tensor_boxes import Segments

_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NAME = re.compile(r"(?P<layer>model\.layers\.\d+\.)?(?P<module>.+)\.(?P<parameter>weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Names of an architecture, by those of Llama: whole names outside of layers, and names in a layer."""

    modules: Mapping[str, str] = field(default_factory=dict)
    fused: str = ""
    """Module of a layer that holds queries, keys and values; empty: each has its own."""
    is_by_heads: bool = False
    """Whether it has the query heads, key and value of one kv head after another; otherwise all queries come first."""

    def of(self, name: str) -> str:
        """Return the name of the tensor that Llama calls ``name``; a part of a fused one has its letter in brackets."""
        match = _NAME.fullmatch(name)
        assert match is not None, name
        layer, module, parameter = match["layer"] or "", match["module"], match["parameter"]
        if self.fused and module in _PARTS:
            return _part_name(f"{layer}{self.fused}.{parameter}", module)
        return f"{layer}{self.modules.get(module, module)}.{parameter}"

    def parts(
        self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> Iterator[tuple[str, StoredTensor]]:
        """Yield the parts of the fused tensors by their names.

        Args:
            tensors: Tensors of a folder.
            config: Content of its ``config.json``, which is not checked yet.

        Raises:
            ValueError: A fused tensor has not the rows that the config says; the message begins with its name.
        """
        sizes = _sizes(config)
        if sizes is None:
            return  # the check of the config says what is wrong
        queries, groups, width = sizes
        heads = dict(zip(_PARTS, (queries, 1, 1), strict=True))
        for name, stored in tensors.items():
            match = _NAME.fullmatch(name)
            if not (match and match["module"] == self.fused):
                continue
            rows, of_row = groups * (queries + 2) * width, math.prod(stored.shape[1:])
            if stored.shape[:1] != (rows,):
                raise ValueError(
                    f"{name!r}: expected {rows} rows for queries, keys and values, got shape {list(stored.shape)}"
                )
            start, stride = 0, rows // groups * of_row
            for module, count in heads.items():
                length = count * width * of_row
                if not self.is_by_heads:
                    length, stride = length * groups, length * groups
                shape = (groups * count * width, *stored.shape[1:])
                yield _part_name(name, module), replace(stored, shape=shape, segments=Segments(start, length, stride))
                start += length


def _part_name(fused: str, module: str) -> str:
    return f"{fused}[{module.removeprefix('self_attn.')[0]}]"


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the query heads of a kv head, the number of kv heads, and the size of a head, if the config has them."""
    heads = config.get("num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    sizes = [size for size in (config.get("hidden_size"), heads, groups) if type(size) is int and size > 0]
    if len(sizes) < 3 or sizes[1] % sizes[2] or sizes[0] % sizes[1]:
        return None
    return sizes[1] // sizes[2], sizes[2], sizes[0] // sizes[1]


LLAMA = Naming()
#: Modules of a block by those of Llama, as InternLM has named them since its first checkpoints.
INTERNLM_BLOCK = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
#: Architectures with other names than Llama's, by ``model_type``.
NAMINGS = {
    # arXiv 2403.17297, section 2
    "internlm2": Naming(
        modules={
            "model.embed_tokens": "model.tok_embeddings",
            "lm_head": "output",
            **INTERNLM_BLOCK,
        },
        fused="attention.wqkv",
        is_by_heads=True,
    ),
    "baichuan": Naming(fused="self_attn.W_pack"),
}
