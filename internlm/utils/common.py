"""Home of ``parse_args``, re-exported from the launcher."""

from internlm.utils.lazy import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, {"parse_args": "internlm.initialize.launch"})
