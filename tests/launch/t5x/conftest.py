"""What needs T5X skips without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import gin
import jax
import pytest

from launch.t5x.start import MISSING


@pytest.fixture
def t5x() -> Iterator[None]:
    """T5X is there, and computes as it is used to: with jax's own promotion of types.

    It registers with gin when it is imported, which a config that an earlier test has resolved would refuse.
    """
    if importlib.util.find_spec("t5x") is None:
        pytest.skip(MISSING)
    with jax.numpy_dtype_promotion("standard"), gin.unlock_config():
        yield
