"""Model types by name.

A function that is registered here is called with the config's ``model`` section and returns the model.
"""

from __future__ import annotations

from internlm.model.families import FAMILIES, build_family
from internlm.utils.registry import MODEL_INITIALIZER

model_initializer = MODEL_INITIALIZER


def register_model_initializer() -> None:
    """Register the built-in model types, unless a type of that name is there already."""
    for name, family in FAMILIES.items():
        if name not in model_initializer:  # a user's own type of the same name goes first
            model_initializer.register_module(name, build_family(family))
