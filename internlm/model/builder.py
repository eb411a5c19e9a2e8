"""Public import path of ``create_model``, which is implemented in ``internlm.train.build_model``."""

from internlm.utils.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, {"create_model": "internlm.train.build_model"})
