"""`pip install -e .` makes common, cv and bert_of_theseus importable; requirements.txt has tested versions."""

from setuptools import find_packages, setup

NLP = "nlp/BERT-of-Theseus"

setup(
    name="dskd",
    version="0.1.0",
    description="DSKD: Direction Sensitivity-based Knowledge Distillation for BERT (GLUE) and ResNets (CIFAR-100)",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["common*", "cv*"]), *find_packages(NLP)],
    package_dir={"bert_of_theseus": f"{NLP}/bert_of_theseus"},
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",
        "transformers>=4.46,<6",
        "accelerate>=1.1",
        "datasets>=3",
        "safetensors>=0.4.5",
        "numpy>=1.26",
        "scipy>=1.12",
        "scikit-learn>=1.4",
        "pandas>=2.2",
        "matplotlib>=3.8",
        "pillow>=10",
        "pyarrow>=15",
        "pyyaml>=6",
        "yacs>=0.1.8",
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "submitit>=1.5",
    ],
    extras_require={
        "onnx": ["onnx>=1.17", "onnxscript>=0.2", "onnxruntime>=1.20"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.8"],
    },
)
