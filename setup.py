"""What is packaged, and what it needs. Tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Releases that the tests of internlm/utils/torch_private.py hold for. requirements/torch.txt pins one of them for
# development: a range there would let pip take the newest, whose default build for Linux brings CUDA along.
TORCH = "torch>=2.13,<2.15"


def requirements(*names: str) -> list[str]:
    """The lines of requirements/<name>.txt, of all ``names``."""
    return [line for name in names for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines() if line]


def version() -> str:
    """``internlm.__version__``, read without importing the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "internlm" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "internlm/__init__.py has no __version__"
    return found.group(1)


setup(
    name="InternEvo",
    version=version(),
    description="A framework for pretraining large language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["internlm", "internlm.*"]),
    install_requires=[TORCH, *requirements("runtime")],
    extras_require={
        "cuda": ["flash-attn"],
        "s3": ["s3fs"],
        "test": requirements("test"),
        "docs": requirements("docs"),
        "bench": ["transformers"],
    },
    entry_points={"console_scripts": ["internlm = internlm.cli.main:main"]},
)
