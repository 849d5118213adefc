"""`pip install .` installs the method, the package dskd, which needs torch alone.

The programs and scripts of this repository (common, cv, nlp, scripts) run from a clone and are not installed; what they
need are the extras `programs`, `onnx` and `dev`. requirements.txt has the versions that were tested together.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PROGRAMS = [
    "torchvision>=0.20",
    "transformers>=4.48.3,<6",
    "accelerate>=1.3",
    "datasets>=3",
    "safetensors>=0.4.5",
    "numpy>=1.26",
    "scipy>=1.12",
    "scikit-learn>=1.4",
    "pandas>=2.2",
    "matplotlib>=3.8",
    "pillow>=10",
    "pyarrow>=15",
    "pydantic>=2.7",
    "jinja2>=3.1",
    "pyyaml>=6",
    "yacs>=0.1.8",
    "tqdm>=4.66.3",
    "tensorboard>=2.17",
    "submitit>=1.5",
]

setup(
    name="dskd",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "dskd/__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="DSKD, Direction Sensitivity-based Knowledge Distillation: a loss that aligns weights, for any network",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=["dskd", "dskd.pairing", "dskd.readings", "dskd.integrations"],
    package_dir={"": "."},
    package_data={"dskd": ["py.typed"]},
    install_requires=["torch>=2.5"],
    extras_require={
        "programs": PROGRAMS,
        "timm": ["timm>=1.0.3"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.6", "onnxruntime>=1.20"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6.1",
            "pytest-cov>=5",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.10",
            "lightning>=2.4",
            "peft>=0.13",
        ],
    },
)
