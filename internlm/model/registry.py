"""Registry of model types by name.

A registered function takes the config's ``model`` section and returns the model.
"""

from __future__ import annotations

from internlm.model.families import FAMILIES, FamilyBuilder
from internlm.model.hf_module import HF_MODULE, build_hf_module
from internlm.utils.registry import MODEL_INITIALIZER

model_initializer = MODEL_INITIALIZER


def register_model_initializer() -> None:
    """Register the built-in model types, except those whose names are already registered."""
    if HF_MODULE not in model_initializer:
        model_initializer.register_module(HF_MODULE, build_hf_module)
    for name, family in FAMILIES.items():
        if name not in model_initializer:  # a user's own type takes precedence
            model_initializer.register_module(name, FamilyBuilder(family))


def is_built_in(name: str) -> bool:
    """Return whether ``name`` is registered as one of the built-in families."""
    return isinstance(model_initializer.get_module(name), FamilyBuilder)
