"""The convert stage: the same numbers in another form, whole or not at all."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import merging
from merging import convert as stage
from merging import manifest
from merging.checkpoints import safetensors
from merging.checkpoints.layouts import Layout, Rule
from merging.convert import Settings, convert
from merging.methods.averaging import Averaging
from tests import models


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.base_and_experts(0)[0]


@pytest.fixture
def folder(model: models.Model, tmp_path: pathlib.Path) -> str:
    saved = models.save(tmp_path / "in", model)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    return saved


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_and_back_is_bit_equal(
    folder: str, model: models.Model, tmp_path: pathlib.Path, axis: int
):
    progress = []
    report = convert(
        Settings(
            input=folder,
            output_dir=tmp_path / "a",
            layout=f"stacked(axis={axis})",
            format="safetensors",
        ),
        progress=lambda *seen: progress.append(seen),
    )
    layers = [model[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    found = models.load(tmp_path / "a")
    np.testing.assert_array_equal(found["model.layers.mlp.up_proj.weight"], np.stack(layers, axis))
    assert progress[-1] == ("convert", report.nbytes, report.nbytes)
    record = manifest.read(tmp_path / "a")
    assert record["stacked"] == dict.fromkeys(
        ["model.layers.mlp.up_proj.weight", "model.layers.norm.weight"], axis
    )
    assert record["inputs"]["input"]["path"] == folder
    assert json.loads((tmp_path / "a/config.json").read_text()) == {"model_type": "llama"}
    assert (tmp_path / "a/tokenizer.json").exists()
    convert(
        Settings(input=tmp_path / "a", output_dir=tmp_path / "b", layout=f"unstacked(axis={axis})")
    )
    assert models.same_bits(models.load(tmp_path / "b"), model)


def test_done_is_done_and_other_settings_are_another_output(folder: str, tmp_path: pathlib.Path):
    settings = Settings(input=folder, output_dir=tmp_path / "out")
    assert not convert(settings).was_done
    again = convert(settings)
    assert again.was_done and "done before" in again.describe()
    with pytest.raises(manifest.OutputError, match="another run, which differs in input"):
        convert(Settings(input=folder, output_dir=tmp_path / "out", layout="stacked"))
    with pytest.raises(manifest.OutputError, match="differs in output_dtype"):
        convert(Settings(input=folder, output_dir=tmp_path / "out", output_dtype="float32"))


def test_float_types_are_rounded_once_and_others_kept(
    folder: str, model: models.Model, tmp_path: pathlib.Path
):
    for name in ("float32", "float16"):
        convert(Settings(input=folder, output_dir=tmp_path / name, output_dtype=name))
        found = models.load(tmp_path / name)
        for leaf, array in model.items():
            wanted = array.astype(name) if array.dtype == models.BFLOAT16 else array
            assert found[leaf].dtype == wanted.dtype and found[leaf].tobytes() == wanted.tobytes()
    convert(
        Settings(input=tmp_path / "float32", output_dir=tmp_path / "b", output_dtype="bfloat16")
    )
    assert models.same_bits(models.load(tmp_path / "b"), model)
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_not_finite_stays_but_does_not_arise(tmp_path: pathlib.Path):
    folder = models.save(tmp_path / "a", {"w": np.array([1, np.nan, np.inf], np.float32)})
    convert(Settings(input=folder, output_dir=tmp_path / "out", output_dtype="float16"))
    assert str(models.load(tmp_path / "out")["w"].tolist()) == "[1.0, nan, inf]"
    folder = models.save(tmp_path / "b", {"w": np.array([1, 7e4], np.float32)})
    with pytest.raises(ValueError, match="leaf w: 1 of 2 elements .* too large for float16"):
        convert(Settings(input=folder, output_dir=tmp_path / "no", output_dtype="float16"))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("no")]


def test_small_budgets_and_shards_change_no_bit(tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    model = {f"l.{i}.w": rng.normal(size=(130, 700)).astype(ml_dtypes.bfloat16) for i in range(3)}
    folder = models.save(tmp_path / "in", model)
    rules = (Rule("l.{layer}.w", "l/w", "(heads dim) embed -> embed layer heads dim"),)
    layout = Layout(name="flax", rules=rules, sizes={"heads": 10})
    wanted = np.stack([a.reshape(10, 13, 700).transpose(2, 0, 1) for a in model.values()], 1)
    for number, (budget, shard) in enumerate([(1 << 17, 10**9), (1 << 20, 10**9), (1 << 30, 1)]):
        settings = Settings(
            input=folder,
            output_dir=tmp_path / f"out_{number}",
            layout=layout,
            memory_budget_bytes=budget,
            shard_bytes=shard,
        )
        convert(settings)
        found = models.load(tmp_path / f"out_{number}")
        assert models.same_bits(found, {"l/w": wanted})
        back = Settings(
            input=tmp_path / f"out_{number}",
            output_dir=tmp_path / f"back_{number}",
            layout=layout.inverse(),
            memory_budget_bytes=budget,
            shard_bytes=shard,
        )
        convert(back)
        assert models.same_bits(models.load(tmp_path / f"back_{number}"), model)


def test_a_failure_leaves_no_output(
    folder: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(safetensors.Reader, "check_unchanged", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(Settings(input=folder, output_dir=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.partial"]
    monkeypatch.undo()
    convert(Settings(input=folder, output_dir=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "pickle"}, "choose one of safetensors"),
        ({"output_dtype": "int8"}, "choose one of float32"),
        ({"layout": "rolled"}, "known are stacked"),
        ({"params_path": "target"}, "has no tree in which PARAMS_PATH"),
        ({"optimizer_state": "base"}, "choose 'drop' or 'input'"),
        (
            {"optimizer_state": "input", "layout": "stacked"},
            "use OPTIMIZER_STATE='drop', or no LAYOUT",
        ),
        ({"optimizer_state": "input"}, "safetensors files hold parameters only"),
        ({"memory_budget_bytes": 100}, "too small to convert"),
        ({"layout": Layout(name="mine", rules=(Rule("a", "b"),))}, "no rule takes it"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    folder: str, tmp_path: pathlib.Path, given: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        stage.plan(Settings(input=folder, output_dir=tmp_path / "out", **given))
    with pytest.raises(manifest.OutputError, match="one lies in the other"):
        stage.plan(Settings(input=folder, output_dir=pathlib.Path(folder) / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def beside(folder: pathlib.Path) -> dict[str, bytes]:
    """What a Hugging Face folder holds beside its parameters, for those who load it."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_config_and_tokenizer_go_through_every_format(
    model: models.Model, folder: str, tmp_path: pathlib.Path
):
    (tmp_path / "in/generation_config.json").write_text('{"eos_token_id": 3}')
    wanted = beside(tmp_path / "in")
    assert len(wanted) == 3
    last: pathlib.Path | str = folder
    for name in ("orbax", "t5x", "t5x_orbax", "safetensors"):
        convert(Settings(input=last, output_dir=tmp_path / name, format=name))
        last = tmp_path / name
        assert beside(last) == wanted, name
    assert models.same_bits(models.load(last), model)
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    assert models.same_bits({k: np.asarray(v) for k, v in restored.items()}, model)
    target = ocp.PyTreeCheckpointer().restore(tmp_path / "t5x_orbax/state")["target"]
    assert models.same_bits({k: np.asarray(v) for k, v in target.items()}, model)


def test_they_go_along_with_a_merge_into_a_tree(folder: str, tmp_path: pathlib.Path):
    wanted = beside(tmp_path / "in")
    merging.merge_checkpoints(
        base=folder,
        experts=[folder],
        method=Averaging(),
        output_dir=tmp_path / "out",
        format="orbax",
        output_dtype="float32",
    )
    config = json.loads(wanted.pop("config.json")) | {"torch_dtype": "float32"}
    found = beside(tmp_path / "out")
    assert json.loads(found.pop("config.json")) == config and found == wanted
    # And from there on, beside a tree.
    merging.merge_checkpoints(
        base=tmp_path / "out",
        experts=[folder],
        method=Averaging(),
        output_dir=tmp_path / "again",
        format="safetensors",
    )
    assert beside(tmp_path / "again") == beside(tmp_path / "out")


@pytest.mark.real
def test_a_real_model_stacked_and_back(real_checkpoints: pathlib.Path, tmp_path: pathlib.Path):
    folder = real_checkpoints / "smollm2"
    convert(Settings(input=folder, output_dir=tmp_path / "a", layout="stacked(axis=1)"))
    convert(Settings(input=tmp_path / "a", output_dir=tmp_path / "b", layout="unstacked(axis=1)"))
    assert models.same_bits(models.load(tmp_path / "b"), models.load(folder))


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_through_all_formats_and_back(
    real_checkpoints: pathlib.Path, tmp_path: pathlib.Path
):
    folder = last = real_checkpoints / "smollm2"
    for name in ("orbax", "t5x", "t5x_orbax", "safetensors"):
        convert(Settings(input=last, output_dir=tmp_path / name, format=name))
        last = tmp_path / name
    assert models.same_bits(models.load(last), models.load(folder))
    assert beside(last) == beside(folder) and "tokenizer.json" in beside(last)
