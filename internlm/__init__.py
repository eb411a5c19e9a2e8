"""InternEvo: a framework for pretraining large language models.

Subpackages and entry points are imported on first use.
"""

import sys

from internlm.utils.compat import ReplacedModules
from internlm.utils.lazy import lazy_exports

__version__ = "0.1.0"

sys.meta_path.append(ReplacedModules)

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "core": "",
        "data": "",
        "initialize": "",
        "model": "",
        "train": "",
        "get_default_parser": "internlm.initialize",
        "initialize_trainer": "internlm.initialize",
        "launch_from_slurm": "internlm.initialize",
        "launch_from_torch": "internlm.initialize",
    },
)
