"""Small models for tests: parameters that hurt, and their folders on disk."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Model = dict[str, np.ndarray]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Names as Hugging Face has them; one shape of each kind that has hurt somebody.
SHAPES = {
    "model.embed_tokens.weight": (257, 24),
    "model.layers.0.mlp.up_proj.weight": (40, 24),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.up_proj.weight": (40, 24),
    "model.layers.1.norm.weight": (24,),
    "model.layers.2.mlp.up_proj.weight": (40, 24),
    "model.layers.2.norm.weight": (24,),
    "model.one.weight": (1,),
    "model.scalar": (),
    "model.nothing": (3, 0),
    "model.square.weight": (96, 96),
}


def base_and_experts(
    experts: int,
    *,
    dtypes: Sequence[np.dtype | type] = (BFLOAT16,),
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    copied: bool = True,
) -> tuple[Model, list[Model]]:
    """A base and its experts; dtypes go round over base and experts.

    The task vectors have magnitudes that tie at any cut (they are multiples of a power of two in half of the square
    leaf), exact cancellations between experts 0 and 1 (a third of the embedding), and zeros.
    """
    rng = np.random.default_rng(seed)
    cast = [np.dtype(dtypes[i % len(dtypes)]) for i in range(experts + 1)]
    # bfloat16 numbers, so that every dtype holds the base exactly and differences between experts stay where made.
    start = {
        k: np.asarray(rng.normal(0, 0.02, s)).astype(BFLOAT16).astype(np.float32)
        for k, s in shapes.items()
    }
    models = []
    for i in range(experts):
        model = {}
        for name, value in start.items():
            step = rng.normal(0, 1e-3, value.shape).astype(np.float32)
            if name == "model.square.weight":
                step[::2] = rng.integers(-2, 3, step[::2].shape) * np.float32(2**-9)
            if name == "model.embed_tokens.weight":
                sign = np.float32(1 if i % 2 == 0 else -1)
                step[::3] = sign * np.float32(2**-8) if i < 2 else 0
            model[name] = np.asarray(value + step, cast[i + 1])
        models.append(model)
    base = {name: np.asarray(value, cast[0]) for name, value in start.items()}
    if copied:
        for model in (base, *models):
            model["model.position_ids"] = np.arange(12, dtype=np.int64).reshape(3, 4)
            model["model.flags"] = np.array([True, False, True])
    return base, models


def save(folder: pathlib.Path, model: Model) -> str:
    """Writes a model as a Hugging Face folder, by the safetensors package; returns the folder."""
    folder.mkdir(parents=True)
    # np.ascontiguousarray makes scalars one-dimensional
    arrays = {k: v if v.flags.c_contiguous else np.ascontiguousarray(v) for k, v in model.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def save_all(folder: pathlib.Path, base: Model, experts: Sequence[Model]) -> dict[str, object]:
    """Writes base and experts; returns the arguments `base` and `experts` of a merge."""
    return {
        "base": save(folder / "base", base),
        "experts": [save(folder / f"expert_{i}", expert) for i, expert in enumerate(experts)],
    }


def load(folder: object) -> Model:
    """The arrays of a written folder, by the safetensors package."""
    model: Model = {}
    for file in sorted(pathlib.Path(str(folder)).glob("*.safetensors")):
        model |= load_file(file)
    return model


def same_bits(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    """Whether two models hold the same leaves, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        (x := np.asarray(a[k])).dtype == (y := np.asarray(b[k])).dtype
        and x.shape == y.shape
        and x.tobytes() == y.tobytes()
        for k in a
    )
