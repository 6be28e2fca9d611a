"""Packaging of ban_jax; everything that a tool must be told stands in pyproject.toml."""

import pathlib
import re

import setuptools

# libtpu, the compiler for TPUs, in the version that fits the installed JAX. It compiles where there is no TPU.
LIBTPU = 'jax[tpu]>=0.10.2; sys_platform == "linux" and platform_machine == "x86_64"'
# What reads and prepares data sets of TensorFlow Datasets, CIFAR among them.
TFDS = [
  "array_record",  # the file format of a prepared data directory
  "importlib_resources",  # TFDS needs it and does not say so
  "requests",  # asks for the archive before a long download is begun
  "tensorflow-datasets>=4.9.10",
]
# What the scripts of a checkout need besides: flags, and plots.
PLOTS = ["matplotlib"]
EXPERIMENTS = ["absl-py", *PLOTS]
ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ban_jax" / "version.py").read_text("utf-8")).group(1)

setuptools.setup(
  name="ban_jax",
  version=VERSION,
  description="Born-Again Networks in JAX and Flax: self-distillation over generations",
  long_description=(ROOT / "README.md").read_text("utf-8"),
  long_description_content_type="text/markdown",
  author="The ban_jax authors",
  license="Apache-2.0",
  license_files=["LICENSE"],
  keywords=["born-again networks", "knowledge distillation", "self-distillation", "jax", "flax", "tpu"],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Typing :: Typed",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  python_requires=">=3.11",
  # The folders configs and experiments stay in a checkout: as installed packages they would take these names from other
  # projects. With this package_dir an editable installation adds the whole checkout to the path.
  packages=setuptools.find_packages(include=["ban_jax*"]),
  package_data={"ban_jax": ["py.typed"]},
  package_dir={"": "."},
  install_requires=[
    "etils[epath,epy]",
    "flatbuffers",  # jax.export writes with it
    "flax>=0.12.8",
    "jax>=0.10.2",
    "jaxlib>=0.10.2",
    "jaxtyping",
    "ml_collections>=1.1",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow",  # decodes the images of a stream, and those of TFDS where TensorFlow is absent
    "safetensors",
    "scikit-learn",  # the embedded data set: handwritten digits
    "tensorboardX",
    "tqdm",
  ],
  extras_require={
    "benchmark": ["grain", "torch"],  # what experiments/bench.py compares with
    "compile": [LIBTPU],  # what experiments/compile.py needs for TPUs
    "cuda": ["jax[cuda12]>=0.10.2"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]"],
    "experiments": [*EXPERIMENTS, *TFDS],
    "notebook": ["ipywidgets", "jupyterlab", *EXPERIMENTS],
    "test": [
      *(*EXPERIMENTS, *TFDS),
      *("beartype", "hypothesis", "ipykernel", "mypy==2.4.1", "nbclient", "nbformat", "pytest", "pytest-xdist"),
      "ruff==0.17.6",
      LIBTPU,
      "tensorboard",  # reads what a run shows; it needs no TensorFlow
    ],
    "plots": PLOTS,
    "tfds": TFDS,
    "tpu": ["jax[tpu]>=0.10.2"],
  },
)
