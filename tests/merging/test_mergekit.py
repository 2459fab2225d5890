"""mergekit's YAML without mergekit: what each part of it becomes, merged and held against the transcriptions; what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import yaml

import merging
from launch import gin_config
from launch.merge import RUN_FILE, configured, mergekit_bindings
from merging import mergekit
from merging.engine.selection import Selection
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from merging.paths import canonical
from tests import models
from tests.merging.test_merge import expected

LAYERS = 4
SHAPES = {
    "model.embed_tokens.weight": (33, 8),
    **{f"model.layers.{i}.mlp.up_proj.weight": (12, 8) for i in range(LAYERS)},
    **{f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(LAYERS)},
    "model.norm.weight": (8,),
    "lm_head.weight": (33, 8),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory):
    base, experts = models.base_and_experts(3, shapes=SHAPES, copied=False, dtypes=(np.float32,))
    folders = models.save_all(tmp_path_factory.mktemp("three"), base, experts)
    return base, experts, folders


def written(folder: pathlib.Path, config: dict[str, Any] | str) -> str:
    path = folder / "merge.yml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return str(path)


def of_experts(folders: dict[str, Any], *parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The experts as `models` has them; without parameters none for each."""
    each = parameters or ({},) * len(folders["experts"])
    return [
        {"model": folder, "parameters": found}
        for folder, found in zip(folders["experts"], each, strict=True)
    ]


# ---- what it becomes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "method"),
    [
        ("linear", {}, Averaging()),
        ("linear", {"normalize": False}, Averaging(combine="sum")),
        ("linear", {"weight": [2.0, 2.0]}, Averaging(weights=(2.0, 2.0, 2.0))),
        ("task_arithmetic", {"lambda": 0.3}, TaskArithmetic(scale=0.3)),
        ("task_arithmetic", {"normalize": True}, TaskArithmetic(scale=1.0, combine="mean")),
        (
            "ties",
            {"density": 0.3, "weight": "5e-1", "int8_mask": True},
            Ties(density=0.3, weights=(0.5, 0.5, 0.5), scope="tensor", zero_sign="positive"),
        ),
        (
            "ties",
            {"normalize": False},
            Ties(density=1.0, scope="tensor", zero_sign="positive", combine="sum"),
        ),
        ("dare_linear", {"density": 0.3}, Dare(density=0.3, scale=1.0, rescale="l1")),
        (
            "dare_linear",
            {"density": 0.3, "rescale": False, "normalize": True},
            Dare(density=0.3, scale=1.0, rescale="none", combine="mean"),
        ),
        (
            "dare_ties",
            {"density": 0.3, "lambda": 2},
            DareTies(density=0.3, scale=2.0, rescale="l1", zero_sign="positive", combine="sum"),
        ),
    ],
)
def test_methods(
    three, tmp_path: pathlib.Path, name: str, parameters: dict[str, Any], method: Method
):
    folders = three[2]
    config = {
        "merge_method": name,
        "base_model": folders["base"],
        "models": [{"model": folder} for folder in folders["experts"]],
        "parameters": {"weight": 1.0} | parameters,
    }
    linear = name == "linear"
    if linear:
        del config["base_model"]  # which would be averaged too
    found = mergekit.translate(written(tmp_path, config))
    assert found.settings == {
        "base": folders["experts"][0] if linear else folders["base"],
        "experts": folders["experts"],
        "method": method,
        "patterns": None,
        "output_dtype": None,
    }


def test_filters_and_gradients(three, tmp_path: pathlib.Path):
    """By hand: 4 layers are at t = 0, 1/3, 2/3 and 1; what is in no layer is at 0; the first filter that fits counts."""
    base, experts, folders = three
    density, weight = [1.0, 0.4, 0.1], [{"filter": "mlp", "value": [0.5, 2.0]}, {"value": 0}]
    config = {
        "merge_method": "ties",
        "base_model": folders["base"],
        "models": [
            {"model": folders["base"]},
            *of_experts(
                folders,
                {"density": density, "weight": 1.0},
                {"density": 0.5, "weight": weight},
                {"density": [0.0, 0.9], "weight": [{"filter": "q_proj", "value": 0.7}]},
            ),
        ],
        "parameters": {
            "weight": 1.5,
            "lambda": [{"filter": "lm_head", "value": 0.5}, {"filter": "*", "value": 1.0}],
        },
        "out_dtype": "float32",
        "dtype": "bfloat16",
        "tokenizer_source": "base",
    }
    path = written(tmp_path, config)
    found = mergekit.translate(path)
    assert found.settings["experts"] == folders["experts"]
    assert found.settings["output_dtype"] == "float32"
    assert "bfloat16" in found.notes[0] and len(found.notes) == 1
    merging.merge_checkpoints(**found.settings, output_dir=tmp_path / "out")
    merged = models.load(tmp_path / "out")

    of_layers = [1.0, (1 - 2 / 3) * 1.0 + 2 / 3 * 0.4, (1 - 1 / 3) * 0.4 + 1 / 3 * 0.1, 0.1]
    for leaf in base:
        layer = int(leaf.split(".")[2]) if "layers" in leaf else None
        t = 0.0 if layer is None else layer / 3
        is_mlp, is_query = "mlp" in leaf, "q_proj" in leaf
        last = (1 - t) * 0.0 + t * 0.9
        if t == 2 / 3:
            of_layer = of_layers[2]
        else:
            of_layer = of_layers[layer or 0]
        method = Ties(
            density=(of_layer, 0.5, last or 1.0),
            weights=(
                1.0,
                (1 - t) * 0.5 + t * 2.0 if is_mlp else 0.0,
                0.0 if last == 0 else 0.7 if is_query else 1.5,
            ),
            scale=0.5 if leaf == "lm_head.weight" else 1.0,
            scope="tensor",
            zero_sign="positive",
        )
        wanted = expected({leaf: base[leaf]}, [{leaf: e[leaf]} for e in experts], method)
        assert models.same_bits({leaf: merged[leaf]}, wanted), leaf


def test_slices_that_are_the_whole_model(three, tmp_path: pathlib.Path):
    """Gradients run over each slice; embeddings belong to the first, norm and readout to the last."""
    base, experts, folders = three

    def sources(layers: list[int]) -> list[dict[str, Any]]:
        names = [folders["base"], *folders["experts"]]
        return [{"model": name, "layer_range": layers} for name in names]

    config = {
        "merge_method": "task_arithmetic",
        "base_model": folders["base"],
        "slices": [
            {"sources": sources([0, 3]), "parameters": {"weight": [0.5, 1.0]}},
            {"sources": sources([3, 4]), "parameters": {"weight": [0.25, 2.0]}},
        ],
    }
    config["slices"][1]["sources"][1]["parameters"] = {"weight": 0.125}
    found = mergekit.translate(written(tmp_path, config)).settings
    merging.merge_checkpoints(**found, output_dir=tmp_path / "out")
    merged = models.load(tmp_path / "out")
    of_layers = [(0.5,) * 3, (0.75,) * 3, (1.0,) * 3, (0.125, 2.0, 2.0)]
    for leaf in base:
        weights = of_layers[int(leaf.split(".")[2])] if "layers" in leaf else (0.125, 0.25, 0.25)
        if "embed" in leaf:
            weights = (0.5,) * 3
        method = TaskArithmetic(scale=1.0, weights=weights)
        wanted = expected({leaf: base[leaf]}, [{leaf: e[leaf]} for e in experts], method)
        assert models.same_bits({leaf: merged[leaf]}, wanted), leaf


def test_layers_that_agree_are_one_pattern(three, tmp_path: pathlib.Path):
    folders = three[2]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": folders["base"],
        "models": of_experts(folders, *({"weight": [1.0, 0.0]},) * 3),
    }
    patterns = mergekit.translate(written(tmp_path, config)).settings["patterns"]
    assert list(patterns) == [f"model/layers/{i}/*" for i in (1, 2, 3)]
    assert patterns["model/layers/3/*"] == {"weights": (0.0, 0.0, 0.0)}


def test_linear_without_a_base_takes_the_first_model(three, tmp_path: pathlib.Path):
    folders = three[2]
    config = {"merge_method": "linear", "models": of_experts(folders, *({"weight": 1},) * 3)}
    found = mergekit.translate(written(tmp_path, config)).settings
    assert found["base"] == folders["experts"][0] and found["experts"] == folders["experts"]


def test_linear_averages_its_base_too(three, tmp_path: pathlib.Path):
    """As mergekit does, which adds base_model to the models; its weight is then the file's own."""
    folders = three[2]
    config = {
        "merge_method": "linear",
        "base_model": folders["base"],
        "models": of_experts(folders, {"weight": 1}, {"weight": 2}, {"weight": 3}),
    }
    with pytest.raises(mergekit.MergekitError, match="weight is missing for .* of .*base"):
        mergekit.translate(written(tmp_path, config))
    config["parameters"] = {"weight": 0.5}
    found = mergekit.translate(written(tmp_path, config))
    assert found.settings["experts"] == [*folders["experts"], folders["base"]]
    assert found.settings["method"] == Averaging(weights=(1.0, 2.0, 3.0, 0.5))
    assert "averaged" in found.notes[0]


def test_gradients_run_over_each_stack_of_layers(tmp_path: pathlib.Path):
    """A model of text and images has two, which mergekit takes apart; GPT-NeoX's embed_out is a readout."""
    names = [f"text.layers.{i}.mlp.weight" for i in range(3)]
    names += [f"vision.layers.{i}.mlp.weight" for i in range(5)]
    shapes = dict.fromkeys([*names, "embed_out.weight"], (4, 4))
    base, experts = models.base_and_experts(1, shapes=shapes, copied=False, dtypes=(np.float32,))
    folders = models.save_all(tmp_path / "models", base, experts)
    config = {
        "merge_method": "task_arithmetic",
        "base_model": folders["base"],
        "models": of_experts(folders, {"weight": [0.0, 1.0]}),
    }
    found = mergekit.translate(written(tmp_path, config)).settings
    selection = Selection(patterns=found["patterns"])
    weights = [selection.method((n, canonical(n)), found["method"]).weights[0] for n in names]
    assert weights == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1]
    del config["models"]
    sources = [{"model": folders["experts"][0], "layer_range": [0, 2], "parameters": {"weight": 1}}]
    second = sources[0] | {"layer_range": [2, 3], "parameters": {"weight": 2}}
    config["slices"] = [{"sources": sources}, {"sources": [second]}]
    with pytest.raises(mergekit.MergekitError, match="has 3 text/layers and 5 vision/layers"):
        mergekit.translate(written(tmp_path, config))


def test_the_command_gets_the_same_settings(three, tmp_path: pathlib.Path):
    folders = three[2]
    config = {
        "merge_method": "dare_ties",
        "base_model": folders["base"],
        "models": of_experts(folders, *({"weight": [0.25, 1.0], "density": 0.5},) * 3),
        "dtype": "float16",
    }
    path = written(tmp_path, config)
    bindings, notes = mergekit_bindings(path)
    found = configured([RUN_FILE], [*bindings, "OUTPUT_DIR = '/out'", "SEED = 3"])
    translated = mergekit.translate(path)
    assert notes == translated.notes
    for name, value in translated.settings.items():
        assert found.arguments[name] == value, name
    assert found.arguments["seed"] == 3
    again = tmp_path / "again.gin"  # what a run prints gives the same again
    again.write_text(found.text)
    gin_config.parse([str(again)], [])
    assert "model/layers/3/*" in found.text


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("- a\n- b", "it holds no keys"),
        ("a: [", "can't be read as YAML"),
        ("a: !!python/object/apply:os.system ['true']", "can't be read as YAML"),
        ({"merge_method": "slerp"}, "merge_method is 'slerp': supported here are linear"),
        ({"merge_method": None}, "merge_method is None"),
        (
            {"merge_metod": "ties"},
            "'merge_metod', which is not supported here; did you mean merge_method",
        ),
        ({"modules": {}}, "modules is not supported"),
        ({"chat_template": "auto"}, "chat_template is not supported"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"out_dtype": "int8"}, "out_dtype is 'int8'"),
        ({"base_model": None}, "base_model is missing, which ties needs"),
        ({"base_model": "meta/Llama"}, "model meta/Llama is no folder here"),
        ({"base_model": {"model": "x"}}, "wanted the path of a folder"),
        ({"models": None}, "wanted one of models and slices"),
        ({"slices": [{}]}, "wanted one of models and slices"),
        ({"models": "BASE"}, "no model beside the base_model"),
        ({"models": "TWICE"}, "twice"),
        ({"models": "LORA"}, "adapters"),
        ({"parameters": {"densty": 0.5}}, "'densty', .* did you mean density"),
        ({"parameters": {"density": 0.5}}, "weight is missing for .* of .*expert_0"),
        ({"parameters": {"weight": "much"}}, "weight is 'much': wanted a finite number"),
        ({"parameters": {"weight": True}}, "weight is True"),
        (
            {"parameters": {"weight": -1.0}},
            "Ties.weights are .*negative",
        ),
        ({"parameters": {"weight": 1, "normalize": 3}}, "normalize is 3"),
        (
            {"merge_method": "dare_linear", "parameters": {"weight": 1e-9, "normalize": True}},
            "whose sum mergekit takes for 0",
        ),
        ({"parameters": {"weight": 1, "rescale": True}}, "rescale: true of ties"),
        (
            {"parameters": {"weight": 1, "normalize": [{"filter": "mlp", "value": False}]}},
            "must be the same for all leaves",
        ),
        ({"parameters": {"weight": [{"fliter": "mlp", "value": 1}]}}, "did you mean filter"),
        ({"tokenizer_source": "union"}, "tokenizer_source is 'union': only 'base'"),
        ({"tokenizer": {}}, "tokenizer_source is 'union'"),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "tokenizer.tokens is not supported"),
        ({"models": "LAMBDA"}, "lambda is one for all models"),
    ],
)
def test_refusals(three, tmp_path: pathlib.Path, change: dict[str, Any] | str, message: str):
    folders = three[2]
    config: Any = {
        "merge_method": "ties",
        "base_model": folders["base"],
        "models": [{"model": folder} for folder in folders["experts"]],
        "parameters": {"weight": 1.0},
    }
    if isinstance(change, dict):
        config |= change
        first = folders["experts"][0]
        given = {
            "BASE": [{"model": folders["base"]}],
            "TWICE": [{"model": first}, {"model": first}],
            "LORA": [{"model": f"{first}+adapter"}],
            "LAMBDA": [{"model": first, "parameters": {"lambda": 1.0}}],
        }
        if isinstance(config["models"], str):
            config["models"] = given[config["models"]]
    else:
        config = change
    path = written(tmp_path, config)
    with pytest.raises(mergekit.MergekitError, match=message) as caught:
        mergekit.translate(path)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 2], [1, 4]], r"slices\[1\] takes the layers .*wanted \[2, "),
        ([[0, 2], [3, 4]], r"slices\[1\] takes"),
        ([[0, 3]], "slices end at layer 3, and .* has 4"),
        ([[0, 5]], "slices end at layer 5"),
        ([[0, 4.0]], "layer_range is"),
    ],
)
def test_slices_that_are_another_model_are_refused(
    three, tmp_path: pathlib.Path, ranges: list[list[int]], message: str
):
    folders = three[2]
    config = {
        "merge_method": "ties",
        "base_model": folders["base"],
        "parameters": {"weight": 1.0},
        "slices": [
            {"sources": [{"model": f, "layer_range": r} for f in folders["experts"]]}
            for r in ranges
        ],
    }
    with pytest.raises(mergekit.MergekitError, match=message):
        mergekit.translate(written(tmp_path, config))


def test_tokenizers_that_differ_are_refused(three, tmp_path: pathlib.Path):
    base, experts, _ = three
    folders = models.save_all(tmp_path / "models", base, experts)
    vocab = {"a": 0, "b": 1}
    for folder, found in [(folders["base"], vocab), (folders["experts"][1], {"b": 0, "a": 1})]:
        text = json.dumps({"model": {"vocab": found}, "added_tokens": []})
        (pathlib.Path(folder) / "tokenizer.json").write_text(text)
    config = {
        "merge_method": "linear",
        "base_model": folders["base"],
        "models": of_experts(folders, *({"weight": 1.0},) * 3),
        "tokenizer_source": "base",
    }
    with pytest.raises(mergekit.MergekitError, match="the tokenizer of .*expert_1 gives tokens"):
        mergekit.translate(written(tmp_path, config))
