"""Sizes: the formula is the modules', the named ones are those of the study, mistakes are told."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from merging.models import decoder
from merging.models.config import SIZES, named
from merging.models.palm import Palm
from tests.merging.models import families


def counted(model: decoder.Decoder) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.abstract_params(model)))


@pytest.mark.parametrize("name", SIZES)
def test_the_formula_counts_what_the_modules_have(name: str):
    assert counted(Palm(SIZES[name])) == SIZES[name].num_params()


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_formula_counts_in_every_family(family: str, scan_layers: bool):
    model = families.build(family, scan_layers=scan_layers)
    assert counted(model) == model.config.num_params()


def test_tied_embeddings_count_once():
    untied = families.CONFIGS["llama"]
    tied = dataclasses.replace(untied, tied_embeddings=True)
    assert untied.num_params() - tied.num_params() == tied.vocab_size * tied.embed_dim
    assert counted(families.build("llama", tied_embeddings=True)) == tied.num_params()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("1b", 1.002),
        ("8b", 8.632),
        ("24b", 23.90),
        ("64b", 64.38),
        ("palm_8b", 8.63),
        ("palm_62b", 62.50),
        ("palm_540b", 540.35),
    ],
)
def test_named_sizes_are_those_of_the_papers(name: str, billions: float):
    digits = len(str(billions).split(".")[1])
    # 540.356 is printed as 540.35.
    assert abs(SIZES[name].num_params() / 1e9 - billions) < 10**-digits


def test_miniature_sizes_are_about_three_times_apart():
    sizes = [SIZES[f"mini_{letter}"] for letter in ("xs", "s", "m", "l")]
    besides = [size.num_params() - size.vocab_size * size.embed_dim for size in sizes]
    assert besides[0] > 100_000 and besides[-1] < 3_500_000
    for smaller, larger in zip(besides, besides[1:], strict=False):
        assert 2.5 < larger / smaller < 3.5


def test_a_named_size_can_be_changed():
    changed = named("mini_s", vocab_size=77, dtype="bfloat16")
    assert (changed.vocab_size, changed.dtype) == (77, "bfloat16")
    assert changed.embed_dim == SIZES["mini_s"].embed_dim


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_layers": 0}, "num_layers is 0: it must be at least 1"),
        ({"head_dim": 7}, "head_dim is 7: it must be even"),
        ({"dropout_rate": 1.0}, r"dropout_rate is 1.0: it must be in \[0, 1\)"),
        ({"dtype": "float64"}, "dtype is 'float64': it must be one of"),
        ({"remat": "some"}, "remat is 'some': it must be one of"),
    ],
)
def test_mistakes_are_told(change: dict, told: str):
    with pytest.raises(ValueError, match=f"PalmConfig.{told}"):
        named("mini_s", **change)


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("llama", {"num_kv_heads": 3}, "num_kv_heads is 3: it must be a divisor of num_heads"),
        ("gemma3", {"layer_kinds": ("local",)}, "must be one per layer"),
        ("gemma3", {"layer_kinds": ("local", "near", "local", "local")}, "must be of"),
        ("gemma3", {"window": 0}, "window is 0: it must be at least 1"),
    ],
)
def test_mistakes_of_a_family_are_told(family: str, change: dict, told: str):
    with pytest.raises(ValueError, match=told):
        families.build(family, **change)


def test_an_unknown_size_is_told():
    with pytest.raises(ValueError, match="no size '2b': the named sizes are mini_xs"):
        named("2b")
