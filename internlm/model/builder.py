"""Published home of ``create_model``, whose code reads the global context and so is in the assembly layer."""

from internlm.utils.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, {"create_model": "internlm.train.build_model"})
