"""Modules of Hugging Face, unmodified: every rank holds them whole, or their blocks are sharded by FSDP.

Shapes: T tokens of a packed row, B sequences of S tokens, V vocabulary entries.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from internlm.config.schema import ModelConfig
from internlm.core.parallel.sharding import place_replicated
from internlm.utils.errors import ConfigError, Problem

HF_MODULE = "hf"  # model type
#: Keys of the section ``model`` that must be what the module has: the attribute with the default applied, and that of
#: the module's config.
SIZES = {
    "num_layers": ("num_layers", "num_hidden_layers"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "num_kv_attention_heads": ("kv_heads", "num_key_value_heads"),
    "vocab_size": ("vocab_size", "vocab_size"),
}


class HFModule(nn.Module):
    """Module of Hugging Face that is called with the fields of a batch and returns logits.

    Args:
        module: Module whose forward takes ``input_ids`` and ``position_ids`` and returns logits.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def blocks(self) -> list[nn.Module]:
        """Return the layers that Hugging Face declares as units that must not be split, in the order of the module."""
        names = getattr(self.module, "_no_split_modules", None) or ()
        return [module for module in self.module.modules() if type(module).__name__ in names]

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None, indexes: Tensor | None = None) -> Tensor:
        """Compute logits: [T] or [B, S] → [*input_ids.shape, V].

        In a packed row, the positions say where a sequence begins: Hugging Face masks attention between sequences
        whose positions begin at 0 again, if a batch has one row and no attention mask.
        """
        ids = input_ids if input_ids.dim() == 2 else input_ids[None]
        positions = None
        if input_ids.dim() == 1:
            assert indexes is not None, "packed rows have positions"
            positions = indexes[None]
        output = self.module(input_ids=ids, position_ids=positions, use_cache=False)
        logits = output[0] if isinstance(output, tuple) else output.logits
        return cast(Tensor, logits).view(*input_ids.shape, -1)


def build_hf_module(model: ModelConfig) -> HFModule:
    """Build the module that ``model.hf`` names, with initial values of its own.

    Raises:
        ConfigError: A class does not exist or rejects its arguments, or sizes differ from those of ``model``.
    """
    hf = model.hf
    if hf is None:
        todo = "Set hf = dict(mod=…, mod_cls=…, cfg=…, cfg_cls=…)"
        raise ConfigError(Problem("model.hf", "is not given, but model_type is 'hf'", todo))
    config = _call("cfg", _class("cfg", hf.cfg, hf.cfg_cls), hf.cfg_extra_kwargs)
    if problems := list(_other_sizes(model, config)):
        raise ConfigError(*problems)
    module = _call("mod", _class("mod", hf.mod, hf.mod_cls), {}, config)
    # Some classes load in the dtype of their config, whatever the default dtype is.
    return cast(HFModule, place_replicated(HFModule(module.to(torch.get_default_dtype()))))


def _class(key: str, module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(Problem(f"model.hf.{key}", f"{module!r} cannot be imported ({error})")) from error
    except AttributeError:
        raise ConfigError(Problem(f"model.hf.{key}_cls", f"{module!r} has no class {name!r}")) from None


def _call(key: str, build: Any, keywords: dict[str, Any], *arguments: Any) -> Any:
    try:
        return build(*arguments, **keywords)
    except Exception as error:  # a class of somebody else's, which may raise anything
        message = f"the class does not accept these settings ({error})"
        raise ConfigError(Problem(f"model.hf.{key}_cls", message, "Correct model.hf.cfg_extra_kwargs")) from error


def _other_sizes(model: ModelConfig, config: Any) -> Iterator[Problem]:
    """Yield a problem for each size that the module and the section ``model``, which costs follow from, disagree on."""
    for key, (ours, theirs) in SIZES.items():
        found = getattr(config, theirs, None)
        if found is not None and found != getattr(model, ours):
            message = f"{getattr(model, ours)}, but {theirs} of {type(config).__name__} is {found}"
            yield Problem(f"model.{key}", message, "Make the two equal: model.hf.cfg_extra_kwargs has the module's")
