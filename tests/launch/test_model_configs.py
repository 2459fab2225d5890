"""gin_configs/models: one file for each named size, which can be changed from the command line."""

from __future__ import annotations

import re

import pytest

from launch import compile_model, gin_config
from merging.models.config import SIZES, DecoderConfig, named

FILES = sorted((gin_config.CONFIGS / "models").glob("*.gin"))


def model_of(name: str, *bindings: str) -> DecoderConfig:
    return compile_model.configured([], bindings, model=name, mesh="cpu8").arguments["model"]


def test_every_size_has_its_file():
    assert {path.stem for path in FILES} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_file_gives_its_size(name: str):
    assert model_of(name) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_what_a_file_says_of_its_size_is_so(name: str):
    text = (gin_config.CONFIGS / "models" / f"{name}.gin").read_text()
    layers, width, count, unit = re.search(
        r"(\d+) layers of ([\d,]+), ([\d.]+) ([MB]) param", text
    ).groups()
    size = SIZES[name]
    assert (int(layers), int(width.replace(",", ""))) == (size.num_layers, size.embed_dim)
    embedding = size.vocab_size * size.embed_dim if "besides the embedding" in text else 0
    found = (size.num_params() - embedding) / {"M": 1e6, "B": 1e9}[unit]
    assert abs(found - float(count)) < 10.0 ** -len(count.split(".")[1])


def test_a_size_can_be_changed():
    changed = model_of("mini_s", "named.vocab_size = 77", "named.dropout_rate = 0.05")
    assert changed == named("mini_s", vocab_size=77, dropout_rate=0.05)
