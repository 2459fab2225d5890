"""The merge from disk to disk: right, the same everywhere, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np
import pytest

import merging
from merging.engine import stream, survey
from merging.kernels.masks import hash32, keep_limit, tensor_key
from merging.manifest import OutputError
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from merging.models import model_file
from merging.models.palm import PalmConfig
from merging.paths import canonical
from tests import models
from tests.oracle import float32 as oracle
from tests.quick_cases import mostly_slow

SETTINGS: dict[str, Method] = {
    "averaging": Averaging(),
    "averaging_weighted": Averaging(weights=(1.0, 0.5, 2.0, 0.3)),
    "task_arithmetic": TaskArithmetic(),
    "task_arithmetic_weighted": TaskArithmetic(scale=0.7, weights=(1.0, 0.5, -2.0, 0.3)),
    "ties": Ties(),
    "ties_scaled": Ties(scale=0.3),
    "ties_dense": Ties(density=0.9),
    "ties_nothing": Ties(density=1e-6),
    "ties_weighted": Ties(density=0.4, weights=(1.0, 0.5, 2.0, 0.3)),
    "ties_tensor": Ties(density=0.3, scope="tensor", zero_sign="positive"),
    "ties_none": Ties(density=0.5, zero_sign="none"),
    "ties_tensor_majority": Ties(density=0.3, scope="tensor"),
    "dare": Dare(),
    "dare_sparse": Dare(density=0.1),
    "dare_l1": Dare(rescale="l1"),
    "dare_ties": DareTies(),
    "dare_ties_trimmed": DareTies(trim_density=0.2),
    "dare_ties_l1": DareTies(trim_density=0.3, rescale="l1", zero_sign="none"),
    "ties_of_each": Ties(density=(0.9, 0.2, 0.5, 0.01), weights=(1.0, 0.0, 2.0, 0.3)),
    "dare_ties_of_each": DareTies(density=(0.9, 0.2, 0.5, 1.0), rescale="l1", combine="sum"),
}


def masks_of(model: models.Model, density: float | Sequence[float], seed: int = 0) -> oracle.Masks:
    """The keep masks of a model as the oracle takes them."""

    def masks(expert: int, name: str) -> np.ndarray:
        index = np.arange(model[name].size, dtype=np.uint32)
        key = tensor_key(seed=seed, expert=expert, path=canonical(name))
        keep = density[expert] if isinstance(density, Sequence) else density
        kept = hash32(key[0], key[1], index) <= np.asarray(keep_limit(np.float32(keep)))
        return kept.reshape(model[name].shape)

    return masks


def expected(
    base: models.Model, experts: list[models.Model], method: Method, seed: int = 0
) -> models.Model:
    """The oracle's merge, rounded once to the base's dtypes."""
    merged = oracle.merge(
        base, experts, method, masks_of(base, getattr(method, "density", 1.0), seed)
    )
    return {name: merged[name].astype(base[name].dtype) for name in base}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory):
    base, experts = models.base_and_experts(4)
    return base, experts, models.save_all(tmp_path_factory.mktemp("four"), base, experts)


@pytest.fixture(scope="module")
def merged(four, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """All settings from one read."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    report = merging.merge_checkpoints(**four[2], output_dir=folder, methods=SETTINGS)
    assert report.reads == 3  # L1 norms; thresholds and votes; the merge
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_streamed_equals_the_transcription_bit_for_bit(four, merged: pathlib.Path, name: str):
    base, experts, _ = four
    assert models.same_bits(models.load(merged / name), expected(base, experts, SETTINGS[name]))


# Each compiles its own programs; the folder that both read is merged by all.
RESIDENT = ["averaging", "task_arithmetic_weighted", "ties", "ties_tensor", "dare", "dare_ties_l1"]


@pytest.mark.parametrize("name", mostly_slow(SETTINGS, quick=RESIDENT))
def test_resident_equals_streamed(four, merged: pathlib.Path, name: str):
    base, experts, _ = four
    resident = merging.merge_params(base, experts, SETTINGS[name])
    assert models.same_bits(models.load(merged / name), resident)


@pytest.mark.parametrize("experts", mostly_slow([1, 2, 16], quick=[2]))
@pytest.mark.parametrize(
    "dtypes",
    [(np.float32,), (np.float16,), (models.BFLOAT16, np.float32, np.float16)],
    ids=["float32", "float16", "mixed"],
)
def test_dtypes_and_numbers_of_experts(tmp_path: pathlib.Path, experts: int, dtypes: tuple):
    base, trained = models.base_and_experts(experts, dtypes=dtypes)
    methods = {
        name: SETTINGS[name] for name in ("averaging", "task_arithmetic", "ties", "dare_ties")
    }
    merging.merge_checkpoints(
        **models.save_all(tmp_path, base, trained), output_dir=tmp_path / "out", methods=methods
    )
    for name, method in methods.items():
        assert models.same_bits(
            models.load(tmp_path / "out" / name), expected(base, trained, method)
        ), name


def test_output_dtype_and_seed(four, tmp_path: pathlib.Path):
    base, experts, folders = four
    merging.merge_checkpoints(
        **folders, output_dir=tmp_path / "out", method=DareTies(), output_dtype="float32", seed=7
    )
    wide = {k: v.astype(np.float32) if v.dtype == models.BFLOAT16 else v for k, v in base.items()}
    want = oracle.merge(base, experts, DareTies(), masks_of(base, 0.5, seed=7))
    got = models.load(tmp_path / "out")
    assert models.same_bits(got, {k: np.asarray(want[k]).astype(wide[k].dtype) for k in base})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float32"


# ---- the same everywhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [3 << 20, 1 << 26])
@pytest.mark.parametrize("shard_bytes", [3_000, 10**9])
def test_budget_and_shards_change_nothing(
    four, merged: pathlib.Path, tmp_path: pathlib.Path, budget: int, shard_bytes: int
):
    names = ("ties", "dare_ties_l1")
    merging.merge_checkpoints(
        **four[2],
        output_dir=tmp_path / "out",
        methods={name: SETTINGS[name] for name in names},
        memory_budget_bytes=budget,
        shard_bytes=shard_bytes,
    )
    for name in names:
        assert models.same_bits(models.load(tmp_path / "out" / name), models.load(merged / name))
    shards = list((tmp_path / "out/ties").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes == 3_000)


@pytest.mark.parametrize("limit", mostly_slow([1 << 6, 1 << 9], quick=[1 << 6]))
def test_slices_change_nothing(
    four, merged: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, limit: int
):
    monkeypatch.setattr("merging.engine.pieces.PIECE_ELEMENTS", limit)
    merging.merge_checkpoints(**four[2], output_dir=tmp_path / "out", methods=SETTINGS)
    for name in SETTINGS:
        assert models.same_bits(models.load(tmp_path / "out" / name), models.load(merged / name)), (
            name
        )


def test_order_of_leaves_changes_nothing(four, merged: pathlib.Path, tmp_path: pathlib.Path):
    base, experts, _ = four

    def shuffled(model: models.Model, seed: int) -> models.Model:
        names = list(model)
        np.random.default_rng(seed).shuffle(names)
        # the safetensors package sorts by dtype and name: other names of files do what an order of leaves does
        return {name: model[name] for name in names}

    folders = {"base": _in_shards(tmp_path / "base", shuffled(base, 1))}
    folders["experts"] = [
        _in_shards(tmp_path / f"e{i}", shuffled(expert, 2 + i)) for i, expert in enumerate(experts)
    ]
    merging.merge_checkpoints(**folders, output_dir=tmp_path / "out", methods=SETTINGS)
    for name in SETTINGS:
        assert models.same_bits(models.load(tmp_path / "out" / name), models.load(merged / name)), (
            name
        )


def _in_shards(folder: pathlib.Path, model: models.Model) -> str:
    """One leaf a file, in the model's order."""
    from safetensors.numpy import save_file

    folder.mkdir()
    weight_map = {}
    for i, (name, leaf) in enumerate(model.items()):
        file = f"model-{i + 1:05d}-of-{len(model):05d}.safetensors"
        save_file({name: leaf}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)


def _stacked(model: models.Model, axis: int) -> models.Model:
    """The model with its layers in one leaf a kind, as `scan` has them; names as in the unscanned one."""
    result = {k: v for k, v in model.items() if ".layers." not in k}
    for kind in ("mlp.up_proj.weight", "norm.weight"):
        layers = [model[f"model.layers.{i}.{kind}"] for i in range(3)]
        result[f"model.layers.{kind}"] = np.stack(layers, axis)
    return result


@pytest.mark.parametrize("axis", mostly_slow([0, 1], quick=[1]))
def test_stacked_layers_change_nothing(
    four, merged: pathlib.Path, tmp_path: pathlib.Path, axis: int
):
    base, experts, _ = four
    folders = models.save_all(tmp_path, _stacked(base, axis), [_stacked(e, axis) for e in experts])
    stacked = {"model/layers/*": axis}
    merging.merge_checkpoints(
        **folders, output_dir=tmp_path / "out", methods=SETTINGS, stacked=stacked
    )
    for name, method in SETTINGS.items():
        want = _stacked(models.load(merged / name), axis)
        assert models.same_bits(models.load(tmp_path / "out" / name), want), name
        resident = merging.merge_params(
            _stacked(base, axis), [_stacked(e, axis) for e in experts], method, stacked=stacked
        )
        assert models.same_bits(resident, want), name


def test_what_the_base_says_of_its_model_goes_along(four, tmp_path: pathlib.Path):
    base, experts, _ = four
    folders = models.save_all(tmp_path, _stacked(base, 0), [_stacked(e, 0) for e in experts])
    config = PalmConfig(
        vocab_size=16, embed_dim=8, num_layers=3, num_heads=2, head_dim=4, mlp_dim=16
    )
    model_file.write(folders["base"], config, {"model/layers/*": 0}, None)
    merging.merge_checkpoints(
        **folders,
        output_dir=tmp_path / "out",
        methods={"ties": Ties(), "dare": Dare()},
        output_dtype="bfloat16",
    )
    for name in ("ties", "dare"):
        found = model_file.read(tmp_path / "out" / name)
        assert found.config == dataclasses.replace(config, param_dtype="bfloat16")
        assert found.stacked == {"model/layers/*": 0}


def test_a_wrong_sample_costs_a_read_and_nothing_else(
    four, merged: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(survey, "answer_from_all", lambda blocks, rank: (5, 6, 5))
    said: list[str] = []
    report = merging.merge_checkpoints(
        **four[2], output_dir=tmp_path / "out", method=Ties(), log=said.append
    )
    assert report.reads > 2
    assert any("bracket did not hold" in line for line in said)
    assert models.same_bits(models.load(tmp_path / "out"), models.load(merged / "ties"))


def test_a_close_majority_costs_a_read_and_nothing_else(
    four, merged: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def vague(blocks: list[np.ndarray], rank: int) -> tuple[int, int, int]:
        low, _, answer = answer_from_all(blocks, rank)
        width = 1 << 16  # as many elements in the bracket as one pass can still tell apart
        return low - width, answer + width, answer + 1  # and the guess is wrong

    answer_from_all = survey.answer_from_all
    monkeypatch.setattr(survey, "answer_from_all", vague)
    said: list[str] = []
    merging.merge_checkpoints(
        **four[2], output_dir=tmp_path / "out", method=Ties(), log=said.append
    )
    assert any("majority sign was too close" in line for line in said)
    assert models.same_bits(models.load(tmp_path / "out"), models.load(merged / "ties"))


def test_many_merges_read_no_more_than_the_dearest(four, tmp_path: pathlib.Path):
    alone = merging.merge_checkpoints(**four[2], output_dir=tmp_path / "one", method=Ties())
    many = {
        "averaging": Averaging(),
        "task_arithmetic": TaskArithmetic(),
        "dare_ties": DareTies(),
        **{f"ties_{d}": Ties(density=d) for d in (0.1, 0.2, 0.3)},
        **{f"scale_{s}": Ties(scale=s) for s in (0.3, 0.5, 0.7, 0.9)},
    }
    report = merging.merge_checkpoints(**four[2], output_dir=tmp_path / "many", methods=many)
    assert report.bytes_read <= alone.bytes_read * 1.001
    for name, method in many.items():
        assert models.same_bits(
            models.load(tmp_path / "many" / name), expected(four[0], four[1], method)
        ), name


# ---- what lies beside the weights ----------------------------------------------------------------------------------


def test_manifest_and_carried_files(merged: pathlib.Path):
    whole = json.loads((merged / "manifest.json").read_text())
    assert set(whole["merges"]) == set(SETTINGS)
    one = json.loads((merged / "ties" / "manifest.json").read_text())
    assert one["method"] == repr(SETTINGS["ties"])
    arrays = models.load(merged / "ties")
    for name, boxes in one["checksums"].items():
        for box, checksum in boxes.items():
            index = tuple(slice(*map(int, part.split(":"))) for part in box.split(",") if part)
            data = np.ascontiguousarray(arrays[name][(*index, ...)]).tobytes()
            assert f"{google_crc32c.value(data):08x}" == checksum, (name, box)
    assert set(one["checksums"]) == {name for name, array in arrays.items() if array.size}
    assert (merged / "ties/config.json").exists()


def test_statistics_agree_with_numpy(four, tmp_path: pathlib.Path):
    base, experts, folders = four
    merging.merge_checkpoints(**folders, output_dir=tmp_path / "out", method=Ties(), statistics=1.0)
    found = json.loads((tmp_path / "out/statistics.json").read_text())
    floats = [k for k, v in base.items() if v.dtype == models.BFLOAT16]
    vectors = [
        np.concatenate(
            [(e[k].astype(np.float32) - base[k].astype(np.float32)).ravel() for k in floats]
        )
        for e in experts
    ]
    stack = np.stack(vectors).astype(np.float64)
    norms = np.linalg.norm(stack, axis=1)
    np.testing.assert_allclose(found["model"]["norms"], norms, rtol=1e-9)
    np.testing.assert_allclose(
        found["model"]["cosines"], stack @ stack.T / np.outer(norms, norms), rtol=1e-9, atol=1e-12
    )
    conflict = ((stack > 0).any(0) & (stack < 0).any(0)).mean()
    np.testing.assert_allclose(found["model"]["sign_conflict_share"], conflict)
    explained = oracle.explain(base, experts, Ties(), masks_of(base, 1.0))
    kept = [
        sum(np.count_nonzero(k[name]) for name in floats) / stack.shape[1] for k in explained.kept
    ]
    # what the trim keeps and is not zero itself
    assert np.all(np.array(found["model"]["kept_share"]) <= np.array(kept) + 1e-12)
    assert found["leaves"]["model.square.weight"]["elements"] == 96 * 96


def test_statistics_do_not_depend_on_slices(
    four, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def whole(folder: pathlib.Path) -> dict:
        merging.merge_checkpoints(**four[2], output_dir=folder, method=Ties(), statistics=0.1)
        return json.loads((folder / "statistics.json").read_text())["model"]

    monkeypatch.setattr("merging.engine.statistics.BLOCK", 64)
    first = whole(tmp_path / "a")
    monkeypatch.setattr("merging.engine.pieces.PIECE_ELEMENTS", 100)
    second = whole(tmp_path / "b")
    assert first["sampled"] == second["sampled"] < first["elements"]
    np.testing.assert_allclose(first["norms"], second["norms"], rtol=1e-9)
    np.testing.assert_allclose(first["cosines"], second["cosines"], rtol=1e-9, atol=1e-12)
    assert first["kept_share"] == second["kept_share"]


# ---- whole or not at all -------------------------------------------------------------------------------------------


def test_done_before_returns_at_once(four, tmp_path: pathlib.Path):
    arguments = {**four[2], "output_dir": tmp_path / "out", "method": Averaging()}
    assert not merging.merge_checkpoints(**arguments).was_done
    before = _tree(tmp_path)
    again = merging.merge_checkpoints(**arguments)
    assert again.was_done and again.bytes_read == 0
    assert _tree(tmp_path) == before
    with pytest.raises(OutputError, match="another run, which differs in seed"):
        merging.merge_checkpoints(**arguments, seed=1)
    assert _tree(tmp_path) == before


def test_what_an_earlier_run_left_unfinished_is_replaced(four, tmp_path: pathlib.Path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/unfinished.json").write_text("{}")
    (tmp_path / "out.partial/model.safetensors").write_text("half")
    merging.merge_checkpoints(**four[2], output_dir=tmp_path / "out", method=Averaging())
    assert not (tmp_path / "out.partial").exists()
    assert models.same_bits(models.load(tmp_path / "out"), expected(four[0], four[1], Averaging()))


def _tree(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def _refused(tmp_path: pathlib.Path, match: str, **arguments: object) -> None:
    """The merge is refused with this message, and nothing on disk has changed."""
    before = _tree(tmp_path)
    arguments = {"output_dir": tmp_path / "out", "method": Ties(), **arguments}
    with pytest.raises(ValueError, match=match):
        merging.merge_checkpoints(**arguments)
    assert _tree(tmp_path) == before
    assert (
        not (tmp_path / "out").exists()
        or "out" in match
        or arguments["output_dir"] != tmp_path / "out"
    )
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def two(tmp_path: pathlib.Path):
    base, experts = models.base_and_experts(2)
    return tmp_path, base, experts


UP = "model.layers.1.mlp.up_proj.weight"


def test_all_differences_are_told_at_once(two):
    tmp_path, base, experts = two
    experts[0][UP] = experts[0][UP][:, :-1].copy()
    del experts[1]["model.layers.2.norm.weight"]
    experts[1]["model.surplus"] = np.zeros(3, models.BFLOAT16)
    experts[1]["model.one.weight"] = np.zeros(1, np.int32)
    experts[0]["model.embed_tokens.weight"] = np.zeros((259, 24), models.BFLOAT16)
    folders = models.save_all(tmp_path, base, experts)
    for match in (
        rf"expert_0: leaf {UP} has shape \(40, 23\), the base has \(40, 24\)",
        r"expert_1: leaf model.layers.2.norm.weight bfloat16\[24\] is missing",
        r"expert_1: leaf model.surplus bfloat16\[3\] is not in the base",
        r"expert_1: leaf model.one.weight is int32, the base has bfloat16",
        r"expert_0: leaf model.embed_tokens.weight .*259 vocabulary rows, not 257",
        r"VOCABULARY_ROWS='common'",
    ):
        _refused(tmp_path, match, **folders)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts": []}, "EXPERTS is empty"),
        ({"method": None}, "neither is set"),
        ({"methods": {"a": Ties()}}, "both are set"),
        ({"method": None, "methods": {"../a": Ties()}}, "becomes a folder's name"),
        ({"method": Ties(weights=(1.0,))}, "1 numbers for 2 experts"),
        ({"output_dtype": "int8"}, "choose one of float32"),
        ({"memory_budget_bytes": 1000}, "too small .* need [0-9,]+ bytes"),
        ({"statistics": 2.0}, "from 0 to 1"),
        ({"stacked": {"no/such/*": 0}}, "match no leaf"),
        ({"stacked": {"model/layers/*": 7}}, "axis 7"),
        ({"base": "/no/such/folder"}, "does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_are_refused(two, change: dict, match: str):
    tmp_path, base, experts = two
    _refused(tmp_path, match, **{**models.save_all(tmp_path, base, experts), **change})


@pytest.mark.parametrize("density", [0, 2, -0.5, float("nan")])
def test_density_is_a_fraction(density: float):
    for method in (Ties, Dare, DareTies):
        with pytest.raises(ValueError, match="density is .*fraction kept"):
            method(density=density)


def test_output_apart_from_inputs(two):
    tmp_path, base, experts = two
    folders = models.save_all(tmp_path, base, experts)
    for output in (folders["base"], folders["experts"][0], tmp_path, folders["base"] + "/inner"):
        _refused(tmp_path, "inputs are never changed", **folders, output_dir=output)


def test_output_in_the_way(two):
    tmp_path, base, experts = two
    folders = models.save_all(tmp_path, base, experts)
    (tmp_path / "file").write_text("mine")
    _refused(tmp_path, "is a file", **folders, output_dir=tmp_path / "file")
    _refused(
        tmp_path, "choose an OUTPUT_DIR whose parent", **folders, output_dir=tmp_path / "file/out"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine")
    _refused(tmp_path, "did not make", **folders, output_dir=tmp_path / "full")
    (tmp_path / "there.partial").mkdir()
    (tmp_path / "there.partial/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not put there by this program"):
        merging.merge_checkpoints(**folders, output_dir=tmp_path / "there", method=Ties())
    assert (tmp_path / "file").read_text() == (tmp_path / "full/thesis.tex").read_text() == "mine"


@pytest.fixture
def read_only(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder on a file system that nobody may write to."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_read_only_output(two, read_only: pathlib.Path):
    tmp_path, base, experts = two
    folders = models.save_all(tmp_path / "inputs", base, experts)
    with pytest.raises(OutputError, match="can't write to .*read_only: .*choose an OUTPUT_DIR"):
        merging.merge_checkpoints(
            **folders, output_dir=read_only / "out", method=Averaging(), shard_bytes=10**9
        )


def test_too_little_room(two, monkeypatch: pytest.MonkeyPatch):
    tmp_path, base, experts = two
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    _refused(tmp_path, "has 10 free", **models.save_all(tmp_path, base, experts))


@pytest.mark.parametrize("where", ["base", "expert"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "method", [Averaging(), TaskArithmetic(), Ties(density=0.01), Dare(density=0.01)]
)
def test_not_finite_stops_and_names_the_culprit(two, where: str, value: float, method: Method):
    tmp_path, base, experts = two
    target = base if where == "base" else experts[1]
    target[UP][3, 5] = value
    folders = models.save_all(tmp_path, base, experts)
    place = "base" if where == "base" else "expert_1"
    _refused(
        tmp_path, rf"{place}: leaf {UP} holds -?(nan|inf) at \(3, 5\)", **folders, method=method
    )
    with pytest.raises(ValueError, match=rf"leaf {UP} holds NaN or infinity"):
        merging.merge_params(base, experts, method)


def test_overflow_is_told_apart_from_bad_input(tmp_path: pathlib.Path):
    base, experts = models.base_and_experts(2, dtypes=(np.float16,))
    base[UP][0, 0], experts[0][UP][0, 0] = 1.0, 60000.0
    folders = models.save_all(tmp_path, base, experts)
    _refused(tmp_path, "overflow the output type", **folders, method=TaskArithmetic(scale=3.0))


def test_integers_that_differ(two):
    tmp_path, base, experts = two
    experts[1]["model.position_ids"] = experts[1]["model.position_ids"] + 1
    folders = models.save_all(tmp_path, base, experts)
    _refused(tmp_path, "expert_1: leaf model.position_ids is int64, which is copied", **folders)
    with pytest.raises(ValueError, match="expert 1: leaf model.position_ids"):
        merging.merge_params(base, experts, Ties())


def test_an_input_that_vanishes_on_the_way(two, monkeypatch: pytest.MonkeyPatch):
    tmp_path, base, experts = two
    folders = models.save_all(tmp_path, base, experts)
    monkeypatch.setattr("merging.engine.pieces.PIECE_ELEMENTS", 64)
    load, calls = stream.Stream.load, []

    def losing(self: stream.Stream, piece: object) -> object:
        calls.append(piece)
        if len(calls) == 20:
            os.unlink(tmp_path / "expert_1/model.safetensors")
        return load(self, piece)

    monkeypatch.setattr(stream.Stream, "load", losing)
    with pytest.raises(ValueError, match="expert_1/model.safetensors"):
        merging.merge_checkpoints(**folders, output_dir=tmp_path / "out", method=Averaging())
    assert len(calls) < 40
    assert not (tmp_path / "out").exists()
