"""The names that users' scripts import. Nothing else is promised."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from internlm.utils.compat import REPLACED_IMPORTS, ReplacedImportError

ROOT = Path(__file__).parents[3]

PROMISED = {
    "internlm": ["get_default_parser", "initialize_trainer", "launch_from_torch", "launch_from_slurm"],
    "internlm.initialize": [
        "get_default_parser",
        "initialize_distributed_env",
        "launch_from_torch",
        "launch_from_slurm",
        "initialize_trainer",
    ],
    "internlm.train": [
        "initialize_model",
        "initialize_model_and_parallel_communicator",
        "initialize_parallel_communicator",
        "initialize_optimizer",
        "get_train_data_loader",
    ],
    "internlm.data": ["build_train_loader_with_data_type", "build_valid_loader_with_data_type"],
    "internlm.core.context": ["global_context", "ParallelMode", "Config"],
    "internlm.core.trainer": ["Trainer", "TrainState"],
    "internlm.core.trainer_builder": ["TrainerBuilder"],
    "internlm.model.builder": ["create_model"],
    "internlm.model.registry": ["model_initializer", "register_model_initializer"],
    "internlm.utils.registry": ["Registry", "MODEL_INITIALIZER"],
    "internlm.solver.optimizer": ["HybridZeroOptimizer"],
    "internlm.checkpoint": ["CheckpointManager"],
    "internlm.monitor": ["initialize_monitor_manager", "internevo_monitor", "send_alert_message"],
    "internlm.utils.common": ["parse_args"],
}
NAMES = [(module, name) for module, names in PROMISED.items() for name in names]
#: Packages that a feature may need, and that nothing needs to be imported.
OPTIONAL = ("sentencepiece", "pyarrow", "tokenizers", "tensorboard", "tqdm", "transformers", "flash_attn")

_IMPORT_WITHOUT = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Blocked())
    import internlm

    for module, name in {names!r}:
        exec(f"from {{module}} import {{name}}")
"""


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_name_is_there(module: str, name: str) -> None:
    """Also once the modules around it are loaded, which must not shadow it."""
    for _ in range(2):
        found = getattr(importlib.import_module(module), name)
        assert not isinstance(found, ModuleType)


@pytest.mark.parametrize("name", REPLACED_IMPORTS)
def test_the_import_of_an_absent_name_names_its_replacement(name: str) -> None:
    module, _, last = name.rpartition(".")
    expected = f"^{re.escape(name)}: does not exist in this project\\. {re.escape(REPLACED_IMPORTS[name])}$"
    with pytest.raises(ReplacedImportError, match=expected):
        exec(f"from {module} import {last}")
    with pytest.raises(ImportError):
        exec(f"from {module} import {last}2")
    used = re.search(r"internlm\.[\w.]+", REPLACED_IMPORTS[name])
    if used:
        home, _, replacement = used[0].rpartition(".")
        assert callable(getattr(importlib.import_module(home), replacement))


def test_packages_are_attributes_after_a_plain_import() -> None:
    names = ("initialize", "train", "data", "core", "model")
    code = f"import internlm\nfor name in {names}: assert getattr(internlm, name).__name__ == f'internlm.{{name}}'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_builder_can_be_fitted() -> None:
    from internlm.core.trainer_builder import TrainerBuilder

    assert callable(TrainerBuilder.fit)


def test_all_can_be_imported_without_optional_packages() -> None:
    code = textwrap.dedent(_IMPORT_WITHOUT.format(blocked=OPTIONAL, names=NAMES))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
