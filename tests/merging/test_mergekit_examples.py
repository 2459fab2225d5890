"""mergekit's own example configurations, and ours of all that they use, give mergekit's tensors in float32.

The examples are those of its repository (folder `examples`), which no package holds: MERGEKIT_EXAMPLES names the folder, else
those tests skip. Names of models are replaced by tiny Llamas, and their dtype by float32. Equal means what
`test_mergekit_parity.py` says: bit for bit, but for linear with weights, where torch rounds a product and its sum once
together (its own arithmetic is transcribed here, and ours is within its rounding), and DARE with mergekit's masks and quotients.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import yaml

import merging
from merging import mergekit
from merging.engine.selection import Selection
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import each_density
from merging.methods.ties import Ties
from merging.paths import canonical
from tests.merging import test_mergekit_parity as parity
from tests.merging.test_mergekit_parity import Checkpoints, Model
from tests.oracle import float32

pytestmark = pytest.mark.peers

HERE = ("linear.yml", "ties.yml", "bio-merge.yml")
NOT_HERE = ("arcee_fusion.yml", "gradient-slerp.yml", "orcamini-platy-44layer.yml")

OURS = {
    "linear": """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: [0.2, 1.0, 0.3]}}
          - {model: b, parameters: {weight: 0.5}}
        parameters: {normalize: false}
        """,
    "linear_with_base": """
        merge_method: linear
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.2}}
          - {model: b, parameters: {weight: [0.5, 1.0]}}
        parameters: {weight: 0.7}
        """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: a, parameters: {weight: {filter: mlp, value: [0.2, -1.0]}}}
          - {model: b, parameters: {weight: 0.5}}
          - {model: base}
        parameters:
          lambda: [{filter: self_attn, value: 0.3}, {value: [1, 0.7]}]
          weight: 2
        """,
    "task_arithmetic_normalized": """
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.3}}
          - {model: b, parameters: {weight: [0.5, 1]}}
          - {model: c, parameters: {weight: 0.9}}
        parameters: {normalize: true, lambda: 0.6}
        """,
    "ties": """
        merge_method: ties
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.5, density: [0.0, 1.0]}}
          - {model: b, parameters: {weight: [0.5, 0.0], density: 0.3}}
          - {model: c, parameters: {weight: 1e-1, density: [{filter: norm, value: 0.5}, {value: 0.2}]}}
        parameters: {lambda: 0.8}
        """,
    "ties_in_slices": """
        merge_method: ties
        base_model: base
        slices:
          - sources:
              - {model: a, layer_range: [0, 3], parameters: {weight: [0.5, 1]}}
              - {model: base, layer_range: [0, 3]}
              - {model: b, layer_range: [0, 3]}
            parameters: {density: 0.4}
          - sources:
              - {model: a, layer_range: [3, 4], parameters: {weight: [0.5, 0.8]}}
              - {model: base, layer_range: [3, 4]}
              - {model: b, layer_range: [3, 4], parameters: {density: [0.9, 0.7]}}
        parameters: {weight: 1, density: 0.6, normalize: false}
        """,
    "dare_linear": """
        merge_method: dare_linear
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.5, density: [0.3, 1.0]}}
          - {model: b, parameters: {weight: [0.5, -0.2], density: 0.5}}
        parameters: {normalize: true, rescale: false, lambda: 0.7}
        """,
    "dare_ties": """
        merge_method: dare_ties
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.5, density: [0.3, 0.9]}}
          - {model: b, parameters: {weight: [0.5, 0.0], density: [0.5, 0]}}
          - {model: c, parameters: {weight: 1, density: 0.6}}
        """,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A base of four layers and three experts, float32."""
    return parity.make(tmp_path_factory.mktemp("four_layers"), dtype="float32", layers=4)


@pytest.mark.parametrize("name", OURS)
def test_ours(name: str, checkpoints: Checkpoints, tmp_path: pathlib.Path):
    check_same_tensors(yaml.safe_load(OURS[name]), checkpoints, tmp_path)


def examples() -> pathlib.Path:
    named = os.environ.get("MERGEKIT_EXAMPLES")
    if not named:
        pytest.skip("MERGEKIT_EXAMPLES does not name the examples folder of mergekit's repository")
    folder = pathlib.Path(named)
    assert folder.is_dir(), f"MERGEKIT_EXAMPLES={named} is no folder"
    return folder


@pytest.mark.parametrize("name", HERE)
def test_examples(name: str, checkpoints: Checkpoints, tmp_path: pathlib.Path):
    check_same_tensors(yaml.safe_load((examples() / name).read_text()), checkpoints, tmp_path)


def test_other_examples_are_refused_by_name():
    """And there are none that this file does not know."""
    assert {path.name for path in examples().glob("*.yml")} == {*HERE, *NOT_HERE}
    for name in NOT_HERE:
        method = yaml.safe_load((examples() / name).read_text())["merge_method"]
        with pytest.raises(mergekit.MergekitError, match=f"merge_method is '{method}'"):
            mergekit.translate(examples() / name)


# ---- helpers --------------------------------------------------------------------------------------------------------


def check_same_tensors(
    config: dict[str, Any], checkpoints: Checkpoints, folder: pathlib.Path
) -> None:
    config = with_local_models(config, checkpoints) | {"dtype": "float32", "out_dtype": "float32"}
    (folder / "merge.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    theirs = parity.run_config(config, folder / "theirs")
    settings = mergekit.translate(folder / "merge.yml").settings
    base = parity.read(pathlib.Path(settings["base"]))
    experts = [parity.read(pathlib.Path(path)) for path in settings["experts"]]
    selection = Selection(patterns=settings["patterns"] or {})
    methods = {leaf: selection.method((leaf, canonical(leaf)), settings["method"]) for leaf in base}
    if isinstance(settings["method"], Dare | DareTies):
        ours = parity.call(methods, base, experts, theirs, l1_ratio=parity.l1_ratio_of_torch)
        parity.assert_equal(ours, theirs.merged)
        return
    merging.merge_checkpoints(**settings, output_dir=folder / "ours")
    ours = parity.read(folder / "ours")
    if isinstance(settings["method"], Averaging):
        check_linear(ours, theirs.merged, methods, experts)
        return
    if isinstance(settings["method"], Ties):
        for leaf, method in methods.items():
            check_no_ties_at_the_cut(leaf, method, base, experts)
    parity.assert_equal(ours, theirs.merged)


def check_linear(
    ours: Model, theirs: Model, methods: Mapping[str, Averaging], experts: list[Model]
) -> None:
    """Theirs is the fused arithmetic bit for bit; ours the oracle's, and no further from it than its roundings."""
    assert sorted(ours) == sorted(theirs)
    for leaf, method in methods.items():
        weights = method.weights or (1.0,) * len(experts)
        fused, size = np.float32(0), 0.0
        for weight, expert in zip(weights, experts, strict=True):
            product = np.float64(np.float32(weight)) * expert[leaf].astype(np.float64)  # exact
            fused = (fused + product).astype(np.float32)
            size = size + abs(product)
        divisor = np.float32(1)
        if method.combine == "mean":
            divisor = float32.ordered_sum([np.float32(weight) for weight in weights])
        np.testing.assert_array_equal(theirs[leaf], fused / divisor, err_msg=leaf)
        wanted = float32.merge(
            {leaf: experts[0][leaf]}, [{leaf: e[leaf]} for e in experts], method, no_masks
        )
        np.testing.assert_array_equal(ours[leaf], wanted[leaf], err_msg=leaf)
        near = (len(experts) + 1) * 2.0**-24 * size / abs(divisor)
        assert (abs(ours[leaf].astype(np.float64) - theirs[leaf]) <= 2 * near).all(), leaf


def no_masks(expert: int, leaf: str) -> np.ndarray:
    raise AssertionError("linear draws nothing")


def check_no_ties_at_the_cut(leaf: str, method: Ties, base: Model, experts: list[Model]) -> None:
    for expert, density in zip(experts, each_density(method.density, len(experts)), strict=True):
        magnitude = abs(expert[leaf] - base[leaf])
        kept = magnitude >= float32.kth_largest([magnitude], density)
        assert np.count_nonzero(kept) == int(density * magnitude.size) > 0, leaf


def with_local_models(config: dict[str, Any], checkpoints: Checkpoints) -> dict[str, Any]:
    """The base's name becomes the base, the others become experts in their order."""
    names = {config["base_model"]: str(checkpoints.base)} if "base_model" in config else {}
    left = iter(map(str, checkpoints.experts))

    def local(value: Any) -> Any:
        if isinstance(value, list):
            return [local(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {
            key: renamed(each) if key in ("model", "base_model") else local(each)
            for key, each in value.items()
        }

    def renamed(name: str) -> str:
        if name not in names:
            names[name] = next(left)
        return names[name]

    return local(config)
