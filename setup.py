"""Packaging for amopo_fast, the trainer. The kernels are a distribution of their own: kernels/pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "amopo_fast" / "__init__.py").read_text(encoding="utf-8"))[1]

EXTRAS = {
    "flash": ["flash-attn>=2.7"],
    "liger": ["liger-kernel>=0.6"],
    "peft": ["bitsandbytes>=0.46.1"],  # QLoRA; LoRA itself needs nothing beyond the requirements
    "bench": ["liger-kernel>=0.6", "cut-cross-entropy>=25.1", "trl>=0.25"],
    "test": [
        "pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6.100", "torchao>=0.15", "bitsandbytes>=0.46.1",
        "tensorboard>=2.16", "ruff>=0.9", "mypy>=1.15", "build>=1.2", "setuptools>=77",
        "trl==1.16.*",  # the objectives are compared with its trainers
        "transformers[serving]",  # a trained folder is asked through its server
    ],
}
EXTRAS["all"] = sorted({requirement for name in ("liger", "peft") for requirement in EXTRAS[name]})

setup(
    name="amopo-fast",
    version=VERSION,
    description="Fast, lean AMoPO: multi-objective preference optimization on fused Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["amopo_fast*"]),
    package_data={"amopo_fast": ["demo/*.json", "demo/*.jsonl", "prompts/templates/*.yaml",
                                 "judges/templates/*.txt"]},
    install_requires=[
        "amopo-kernels>=0.1",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "psutil>=5.9",
        "peft>=0.18",
        "datasets>=4.0",
        "safetensors>=0.8",
        "xxhash>=3.0",
        "jsonschema>=4.18",
        "huggingface-hub>=1.0",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "pyyaml>=6.0",
        "rich>=13.0",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["amopo-fast=amopo_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
