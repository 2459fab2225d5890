"""Part of a model merged, or parts of it with settings of their own; tied leaves; vocabularies that grew."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import merging
from merging.methods.averaging import Averaging
from merging.methods.dare_ties import DareTies
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from tests import models
from tests.merging.test_merge import expected

EMBED, SQUARE = "model.embed_tokens.weight", "model.square.weight"
UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory):
    base, experts = models.base_and_experts(3)
    return base, experts, models.save_all(tmp_path_factory.mktemp("three"), base, experts)


def part(model: models.Model, names: list[str]) -> models.Model:
    return {name: model[name] for name in names}


def test_what_is_left_out_is_the_bases_and_counts_nowhere(three, tmp_path: pathlib.Path):
    base, experts, folders = three
    methods = {"ties": Ties(), "dare_ties": DareTies(), "l1": DareTies(rescale="l1")}
    merging.merge_checkpoints(
        **folders,
        output_dir=tmp_path / "out",
        methods=methods,
        include=["*"],
        exclude=["*embed*", "model/layers/1/*", "model.square.weight"],
    )
    chosen = [UP[0], UP[2], "model.layers.0.norm.weight", "model.layers.2.norm.weight"]
    chosen += ["model.one.weight", "model.scalar", "model.nothing"]
    for name, method in methods.items():
        found = models.load(tmp_path / "out" / name)
        wanted = expected(part(base, chosen), [part(e, chosen) for e in experts], method)
        assert models.same_bits(part(found, chosen), wanted)
        rest = [leaf for leaf in base if leaf not in chosen]
        assert models.same_bits(part(found, rest), part(base, rest))


def test_include_is_the_same_from_the_other_side(three, tmp_path: pathlib.Path):
    base, experts, folders = three
    merging.merge_checkpoints(
        **folders, output_dir=tmp_path / "out", method=Ties(), include=["model.layers.*up_proj*"]
    )
    found = models.load(tmp_path / "out")
    assert models.same_bits(
        part(found, UP), expected(part(base, UP), [part(e, UP) for e in experts], Ties())
    )
    rest = [leaf for leaf in base if leaf not in UP]
    assert models.same_bits(part(found, rest), part(base, rest))


def test_experts_may_differ_in_what_is_left_out(three, tmp_path: pathlib.Path):
    base, experts, _ = three
    experts = [dict(expert) for expert in experts]
    experts[0][EMBED] = np.zeros((3, 24), models.BFLOAT16)
    del experts[1][EMBED]
    experts[2]["model.embed_more.weight"] = np.zeros(3, models.BFLOAT16)
    folders = models.save_all(tmp_path, base, experts)
    merging.merge_checkpoints(
        **folders, output_dir=tmp_path / "out", method=Averaging(), exclude=["*embed*"]
    )
    assert models.same_bits(part(models.load(tmp_path / "out"), [EMBED]), part(base, [EMBED]))


def test_settings_of_some_leaves(three, tmp_path: pathlib.Path):
    """Scales share the whole model's facts; a density is a model of its own; the first pattern counts."""
    base, experts, folders = three
    methods = {"ties": Ties(), "other": Ties(density=0.5, scale=0.3), "sum": TaskArithmetic()}
    merging.merge_checkpoints(
        **folders,
        output_dir=tmp_path / "out",
        methods=methods,
        patterns={
            "model.layers.1.*": {"density": 0.5, "weights": [1.0, 2.0, 0.5]},
            "*layers*": {"scale": 0.25},
            "*square*": {"density": 0.5},
        },
        statistics=1.0,
    )
    found = {name: models.load(tmp_path / "out" / name) for name in methods}
    second = [name for name in base if name.startswith("model.layers.1.")]
    layers = [name for name in base if "layers" in name and name not in second]
    others = [name for name in base if name not in (*second, *layers, SQUARE)]

    def check(merge: str, model: list[str], leaves: list[str], method: object) -> None:
        wanted = expected(part(base, model), [part(e, model) for e in experts], method)
        assert models.same_bits(part(found[merge], leaves), part(wanted, leaves))

    check("ties", [*layers, *others], layers, Ties(scale=0.25))
    check("ties", [*layers, *others], others, Ties())
    check("ties", [SQUARE], [SQUARE], Ties(density=0.5))
    check("ties", second, second, Ties(density=0.5, weights=(1.0, 2.0, 0.5)))
    # What two merges do alike in one leaf is told apart by the leaves that they trim together.
    check("other", [*layers, *others, SQUARE], [SQUARE], Ties(density=0.5, scale=0.3))
    check("sum", list(base), layers, TaskArithmetic(scale=0.25))
    check("sum", list(base), second, TaskArithmetic(weights=(1.0, 2.0, 0.5)))
    check("sum", list(base), [*others, SQUARE], TaskArithmetic())


def test_a_pattern_may_name_layers_of_a_stacked_leaf(tmp_path: pathlib.Path):
    names = ["model.layers.0.w", "model.layers.1.w", "model.layers.2.w"]
    base, experts = models.base_and_experts(2, shapes=dict.fromkeys(names, (5, 7)), copied=False)

    def stacked(model: models.Model) -> models.Model:
        return {"model.layers.w": np.stack([model[name] for name in names])}

    settings = {"exclude": ["model/layers/1/*"], "patterns": {"model/layers/2/w": {"scale": 0.5}}}
    for folder, of, more in (
        ("plain", lambda model: model, {}),
        ("stacked", stacked, {"stacked": {"model/layers": 0}}),
    ):
        merging.merge_checkpoints(
            **models.save_all(tmp_path / folder, of(base), [of(e) for e in experts]),
            output_dir=tmp_path / folder / "out",
            method=DareTies(),
            **settings,
            **more,
        )
    plain = models.load(tmp_path / "plain" / "out")
    assert models.same_bits(models.load(tmp_path / "stacked" / "out"), stacked(plain))
    assert models.same_bits(part(plain, names[1:2]), part(base, names[1:2]))


def test_common_rows_of_a_vocabulary(three, tmp_path: pathlib.Path):
    """The rows that all have are merged, and alone enter thresholds; the base's others stay."""
    base, experts, _ = three
    grown = [dict(expert) for expert in experts]
    grown[0][EMBED] = np.concatenate([grown[0][EMBED], np.ones((3, 24), models.BFLOAT16)])
    grown[1][EMBED] = grown[1][EMBED][:250].copy()
    folders = models.save_all(tmp_path, base, grown)
    for budget in (1 << 30, 1 << 19):
        out = tmp_path / f"out_{budget}"
        merging.merge_checkpoints(
            **folders,
            output_dir=out,
            method=Ties(),
            vocabulary_rows="common",
            memory_budget_bytes=budget,
        )
        found = models.load(out)
        cut = [{**model, EMBED: model[EMBED][:250]} for model in (base, *experts)]
        wanted = expected(cut[0], cut[1:], Ties())
        wanted[EMBED] = np.concatenate([wanted[EMBED], base[EMBED][250:]])
        assert models.same_bits(found, wanted)


def test_tied_leaves(three, tmp_path: pathlib.Path):
    base, experts, _ = three
    tied = {"lm_head.weight": EMBED}
    whole = [{**model, "lm_head.weight": model[EMBED].copy()} for model in (base, *experts)]
    # The base holds both, an expert only one.
    folders = models.save_all(tmp_path / "a", whole[0], [experts[0], whole[2], experts[2]])
    merging.merge_checkpoints(**folders, output_dir=tmp_path / "a/out", method=Ties(), tied=tied)
    assert models.same_bits(models.load(tmp_path / "a/out"), expected(whole[0], whole[1:], Ties()))
    # The base ties; an expert holds a copy.
    folders = models.save_all(tmp_path / "b", base, [experts[0], whole[2], experts[2]])
    merging.merge_checkpoints(**folders, output_dir=tmp_path / "b/out", method=Ties(), tied=tied)
    assert models.same_bits(models.load(tmp_path / "b/out"), expected(base, experts, Ties()))
    # ... or something else.
    whole[2]["lm_head.weight"][100, 3] += 1
    folders = models.save_all(tmp_path / "c", base, [experts[0], whole[2], experts[2]])
    with pytest.raises(ValueError, match=r"expert_1: leaf lm_head.weight is not a copy of"):
        merging.merge_checkpoints(
            **folders, output_dir=tmp_path / "c/out", method=Ties(), tied=tied
        )
    with pytest.raises(ValueError, match=r"lm_head.weight .* is not in the base"):
        merging.merge_checkpoints(**folders, output_dir=tmp_path / "c/out", method=Ties())


def test_output_types_hold_for_what_is_left_out(three, tmp_path: pathlib.Path):
    base, _, folders = three
    merging.merge_checkpoints(
        **folders,
        output_dir=tmp_path / "out",
        method=Averaging(),
        exclude=["*square*"],
        output_dtype="float32",
    )
    found = models.load(tmp_path / "out")[SQUARE]
    assert models.same_bits({"a": found}, {"a": base[SQUARE].astype(np.float32)})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"include": "*mlp*"}, r"INCLUDE is '\*mlp\*': give a list"),
        ({"include": ["*no_such*"]}, r"INCLUDE has '\*no_such\*', which no leaf is like"),
        ({"exclude": ["*no_such*"]}, "EXCLUDE has"),
        ({"exclude": ["*"]}, "leave nothing to merge"),
        ({"patterns": {"*no_such*": {"scale": 1.0}}}, "PATTERNS has"),
        ({"patterns": ["*mlp*"]}, "PATTERNS is"),
        ({"patterns": {"*mlp*": {"densty": 0.1}}}, "did you mean 'density'"),
        ({"patterns": {"*mlp*": {"density": 2.0}}}, r"PATTERNS\['\*mlp\*'\]: .*density"),
        ({"patterns": {"*mlp*": {"weights": [1.0]}}}, "1 numbers for 3 experts"),
        (
            {"patterns": {"*mlp*": {"density": 0.1}}, "method": TaskArithmetic()},
            "'density', which TaskArithmetic does not have",
        ),
        ({"vocabulary_rows": "some"}, "VOCABULARY_ROWS is 'some'"),
        ({"tied": "yes"}, "TIED is 'yes'"),
        (
            {"tied": {"model.embed_token.weight": "model.square.weight"}},
            "TIED has 'model.embed_token.weight', which no leaf is like; did you mean model.embed_tokens.weight",
        ),
        (
            {"tied": {EMBED: "no_such"}},
            "TIED has 'no_such', which no leaf is like; leaves are named",
        ),
    ],
)
def test_wrong_selections_are_refused(three, tmp_path: pathlib.Path, settings: dict, match: str):
    arguments = {"method": Ties(), **three[2], **settings}
    with pytest.raises(ValueError, match=match):
        merging.merge_checkpoints(**arguments, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())
