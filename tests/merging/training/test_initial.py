"""What a run starts from: rules for a part of a checkpoint, and whole train states."""

from __future__ import annotations

import pathlib
import shutil

import jax
import numpy as np
import pytest

from merging.checkpoints.format import CheckpointError
from merging.training import initial
from tests.merging.training import runs

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of four steps that keeps its state."""
    folder = tmp_path_factory.mktemp("base") / "out"
    runs.run(folder, train_steps=4, keep_state=True)
    return folder


def started(base: pathlib.Path, restore: initial.Restore, seed: int = 7) -> dict[str, np.ndarray]:
    mesh = runs.settings(base).mesh
    tree = initial.initial_params(base, runs.CONFIG, mesh, seed=seed, restore=restore)
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v) for k, v in leaves}


def test_rules_say_what_comes_from_where(base: pathlib.Path):
    stored = runs.params(base)
    mesh = runs.settings(base).mesh
    drawn = initial.drawn_params(runs.CONFIG, mesh, 7)
    rules = [
        ("token_embedder/.*", None),
        (r"layers/mlp/wi_([01])/kernel", r"layers/mlp/wi_0/kernel"),
    ]
    found = started(base, rules)
    assert found.keys() == stored.keys()
    for name in found:
        if name == "token_embedder/embedding":
            wanted = np.asarray(drawn["token_embedder"]["embedding"])
            assert not np.array_equal(wanted, stored[name])
        elif name == "layers/mlp/wi_1/kernel":
            wanted = stored["layers/mlp/wi_0/kernel"]
        else:
            wanted = stored[name]
        assert np.array_equal(found[name], wanted), name


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layers/(.*)", r"blocks/\1")], r"blocks/attention/key/kernel.*missing"),
        ([("layers/norm/.*", "token_embedder/embedding")], r"is \[64, 16\], wanted \[2, 16\]"),
        ([("nothing", None)], "'nothing' is like no parameter"),
        ([(".*", None)], "nothing is taken from the checkpoint"),
    ],
)
def test_rules_that_lead_nowhere_are_refused_before(
    base: pathlib.Path, rules: initial.Restore, message: str, tmp_path: pathlib.Path
):
    with pytest.raises(CheckpointError, match=message):
        runs.run(tmp_path / "out", initial_checkpoint_path=base, restore=rules)
    assert not any(tmp_path.iterdir())


def test_a_whole_state_goes_on_with_its_moments(base: pathlib.Path, tmp_path: pathlib.Path):
    step = base / "checkpoints/0/4"
    before = sorted(step.rglob("*"))
    asked = {"initial_checkpoint_path": step, "restore_state": True}
    with pytest.raises(ValueError, match=r"taken 4 steps already, and TRAIN_STEPS=4"):
        runs.run(tmp_path / "short", train_steps=4, **asked)
    runs.run(tmp_path / "whole", train_steps=6, **asked)
    assert sorted(step.rglob("*")) == before
    lines = runs.curve(tmp_path / "whole")
    assert [line["step"] for line in lines if "loss" in line] == [5, 6]
    # Parameters alone: the first step is the same but for the moments, which begin at nothing.
    runs.run(tmp_path / "params", train_steps=2, initial_checkpoint_path=base)
    first, anew = lines[0], runs.curve(tmp_path / "params")[0]
    assert not np.isclose(first["update_norm"], anew["update_norm"], rtol=1e-3)


def test_what_is_no_state_of_this_run_is_refused(base: pathlib.Path, tmp_path: pathlib.Path):
    with pytest.raises(CheckpointError, match="give a step's folder of a run with KEEP_STATE"):
        runs.run(tmp_path / "out", initial_checkpoint_path=base, restore_state=True)
    step = tmp_path / "4"
    shutil.copytree(base / "checkpoints/0/4", step)
    for data in (step / "state").rglob("d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 0x10
        data.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        runs.run(tmp_path / "out", train_steps=6, initial_checkpoint_path=step, restore_state=True)
