"""What every merge method owes, for each one found: its contract, and its numbers against the oracles.

A method added to `merging/methods` is tested here the day it is added; all it needs is a transcription of its paper in
`tests/oracle/float32.py` (and in `float64.py`, unless it fits what stands there).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array

from merging.kernels import masks
from merging.kernels.element_index import element_index
from merging.methods import METHODS, snake_case
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method, Survey
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from tests.oracle import float32, float64
from tests.oracle import masks as oracle_masks
from tests.oracle.float32 import Masks, Model

SEED = 7
SCALES = (0.0, 1.0, 0.4, 1 / 3, -1.0)
WEIGHTS = (0.3, 1.0, 1.7, 0.55, 1.0, 2.0, 0.1, 0.9, 1.1, 0.45, 1.3, 0.7, 1.0, 0.25, 3.0, 0.6)
VALUES = {  # of the fields that are numbers; 0.0003 of a small model's entries is none of them
    "scale": SCALES,
    "density": (1.0, 0.9, 0.5, 0.2, 0.0003),
    "trim_density": (None, 1.0, 0.3, 0.0003),
}
FLOAT32, BFLOAT16, FLOAT16 = (
    np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(np.float16),
)
DTYPES = {  # the base's, and the experts' in turn
    "float32": (FLOAT32, (FLOAT32,)),
    "bfloat16": (BFLOAT16, (BFLOAT16,)),
    "float16": (FLOAT16, (FLOAT16,)),
    "mixed": (BFLOAT16, (FLOAT32, FLOAT16, BFLOAT16)),
}
# Run by default; compiling for all pairs takes minutes.
SOME_PAIRS = (("float32", 1), ("bfloat16", 8), ("float16", 2), ("mixed", 16))

each_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
each_dtype_and_number = pytest.mark.parametrize(
    "dtypes, experts",
    [
        pytest.param(*pair, marks=() if pair in SOME_PAIRS else pytest.mark.slow)
        for pair in itertools.product(DTYPES, (1, 2, 8, 16))
    ],
)


# ---- the contract ------------------------------------------------------------------------------------------------


def test_the_methods_that_are_promised_are_found():
    assert {"averaging", "task_arithmetic", "ties", "dare", "dare_ties"} <= set(METHODS)


@each_method
def test_is_a_frozen_dataclass_of_keywords(cls: type[Method]):
    method = cls()
    assert METHODS[snake_case(cls.__name__)] is cls
    assert method == cls() and hash(method) == hash(cls())
    for field in dataclasses.fields(cls):
        assert field.kw_only
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    assert method.kind in ("elementwise", "whole")


@pytest.mark.parametrize(
    "name, expected",
    [("Ties", "ties"), ("DareTies", "dare_ties"), ("TaskArithmetic", "task_arithmetic")],
)
def test_snake_case(name: str, expected: str):
    assert snake_case(name) == expected


@each_method
def test_is_a_pytree_of_its_numbers(cls: type[Method]):
    for method in _settings(cls, experts=3):
        leaves, structure = jax.tree.flatten(method)
        assert all(isinstance(leaf, float) for leaf in leaves)
        assert jax.tree.unflatten(structure, leaves) == method
        numbers = jax.tree.map(jnp.float32, method)  # as inside jit
        assert type(numbers) is cls and jax.tree.structure(numbers) == structure


@each_method
def test_settings_share_a_compiled_step(cls: type[Method]):
    base, experts = _hurting_model("float32", 2)
    compiled = jax.jit(lambda *arguments: _merge_leaves(*arguments))
    for scale in SCALES[1:]:
        fields = {field.name for field in dataclasses.fields(cls)} & {"scale", "density"}
        method = cls(**dict.fromkeys(fields, abs(scale)))
        compiled(method, base, experts, *_surveys_and_keys(method, base, experts))
    assert compiled._cache_size() == 1


@each_method
def test_jitted_equals_eager(cls: type[Method]):
    """With the method's numbers as arguments of the jitted function and as constants in it."""
    base, experts = _hurting_model("mixed", 3)
    for method in _corner_settings(cls, experts=3):
        facts = _surveys_and_keys(method, base, experts)
        eager = _merge_leaves(method, base, experts, *facts)
        arguments = _merge_jitted(method, base, experts, *facts)
        constants = jax.jit(functools.partial(_merge_leaves, method))(base, experts, *facts)
        _assert_same_bits(arguments, eager, method)
        _assert_same_bits(constants, eager, method)


@each_method
def test_gives_float32_and_leaves_its_inputs_alone(cls: type[Method]):
    base, experts = _hurting_model("mixed", 2)
    arrays = jax.tree.map(jnp.array, (base, experts))
    method = cls()
    facts = _surveys_and_keys(method, base, experts)
    merged, again = (_merge_leaves(method, *arrays, *facts) for _ in range(2))
    for name, leaf in base.items():
        assert merged[name].dtype == jnp.float32
        assert merged[name].shape == leaf.shape
    _assert_same_bits(merged, again, method)
    _assert_same_bits(arrays[0], base, method)
    for expert, before in zip(arrays[1], experts, strict=True):
        _assert_same_bits(expert, before, method)


@each_method
def test_slices_merged_alone_equal_slices_of_the_whole(cls: type[Method]):
    if cls.kind != "elementwise":
        pytest.skip(f"{cls.__name__} needs whole tensors")
    base, others = _hurting_model("float32", 3)
    base, *others = ({"leaf": model["values"].reshape(8, 125)} for model in (base, *others))
    leaf, vectors = base["leaf"], [expert["leaf"] for expert in others]
    for method in _corner_settings(cls, experts=3):
        surveys, keys = _surveys_and_keys(method, base, others)
        whole = _merge_leaf(method, leaf, vectors, surveys["leaf"], keys["leaf"])
        for rows, columns in [(2, 5), (10, 60)], [(6, 7), (0, 125)], [(0, 8), (124, 125)]:
            box = slice(*rows), slice(*columns)
            part = _merge_leaf(
                method,
                leaf[box],
                [vector[box] for vector in vectors],
                surveys["leaf"],
                keys["leaf"],
                strides=(leaf.shape[1], 1),
                offset=rows[0] * leaf.shape[1] + columns[0],
            )
            assert _bits(part) == _bits(np.asarray(whole)[box]), method


# ---- the numbers -------------------------------------------------------------------------------------------------


@each_dtype_and_number
@each_method
def test_equals_the_float32_transcription(cls: type[Method], dtypes: str, experts: int):
    base, others = _hurting_model(dtypes, experts)
    for method in _corner_settings(cls, experts=experts):
        _assert_same_bits(*_merged_and_expected(method, base, others), method)


@pytest.mark.parametrize("dtypes", ("float32", pytest.param("mixed", marks=pytest.mark.slow)))
@each_method
def test_every_setting_equals_the_float32_transcription(cls: type[Method], dtypes: str):
    base, others = _hurting_model(dtypes, 3)
    for method in _settings(cls, experts=3):
        _assert_same_bits(*_merged_and_expected(method, base, others), method)


@pytest.mark.parametrize(
    "method",
    [
        Ties(density=(0.9, 0.2, 0.5), weights=(1.0, 0.0, 2.0)),
        Ties(density=(0.9, 0.2, 0.5), scope="tensor", weights=(0.0, 0.0, 0.0)),
        Dare(density=(0.9, 0.2, 0.5), rescale="l1", combine="mean"),
        Dare(density=(0.9, 0.2, 0.5), rescale="none"),
        DareTies(density=(0.9, 0.2, 0.5), rescale="l1", weights=(0.0, 0.5, 2.0), combine="sum"),
        DareTies(density=(0.9, 0.2, 0.5), rescale="none", trim_density=0.3),
    ],
    ids=repr,
)
def test_densities_and_weights_of_each_expert_equal_the_float32_transcription(method: Method):
    base, others = _hurting_model("float32", 3)
    _assert_same_bits(*_merged_and_expected(method, base, others), method)


@each_dtype_and_number
@each_method
def test_is_within_the_bound_of_float64(cls: type[Method], dtypes: str, experts: int):
    base, others = _hurting_model(dtypes, experts)
    for method in _corner_settings(cls, experts=experts):
        merged, _ = _merged_and_expected(method, base, others)
        exact = float64.explain(base, others, method, _oracle_masks(method, base))
        for name, leaf in base.items():
            stored = np.asarray(merged[name]).astype(leaf.dtype).astype(np.float64)
            for result, dtype in ((stored, leaf.dtype), (np.float64(merged[name]), FLOAT32)):
                larger = np.maximum(abs(exact.merged[name]), abs(result))
                bound = float64.bound(exact.magnitude[name], larger, experts=experts, dtype=dtype)
                error = abs(result - exact.merged[name])
                assert (error <= bound).all(), (method, name, (error / bound).max())


@pytest.mark.parametrize("experts", (pytest.param(3, marks=pytest.mark.slow), 8))
@each_method
def test_bfloat16_results_equal_the_rounded_float64_ones(cls: type[Method], experts: int):
    """In 99.99 % of realistic elements at the defaults and 99.8 % at any scale. The rest lie so near the middle of two
    bfloat16 numbers that float32's rounding, or that of lambda to float32, decides."""
    base, others = _realistic_model(experts)
    method = cls()
    keep = _draw(SEED, range(experts), "leaf", base["leaf"].shape, method)
    exact = float64.explain(base, others, method, lambda expert, name: keep[expert])
    facts = _surveys_and_keys(method, base, others, lambda expert, name: keep[expert])

    def share_of_equals(method: Method, expected: np.ndarray) -> float:
        merged = _merge_jitted(method, base, others, *facts)["leaf"]
        equal = np.asarray(merged).astype(BFLOAT16) == float64.rounded(expected, BFLOAT16)
        assert equal.size >= 2**20
        return equal.mean()

    assert share_of_equals(method, exact.merged["leaf"]) >= 0.9999
    if hasattr(method, "scale"):
        theta = base["leaf"].astype(np.float64)
        for scale in (*SCALES, 0.1, 0.3, 0.7, 1.1, 2.0, 1e-3):
            expected = theta + scale * exact.direction["leaf"]
            share = share_of_equals(dataclasses.replace(method, scale=scale), expected)
            assert share >= 0.998, scale


@pytest.mark.parametrize("dtype", (FLOAT32, BFLOAT16, FLOAT16), ids=str)
def test_the_oracle_rounds_to_the_nearest_stored_number(dtype: np.dtype):
    """float32 numbers, which numpy and ml_dtypes round once; then float64 ones just off the middle of two neighbours."""
    x = np.random.default_rng(0).normal(0, 1, 10_000) * 2.0 ** np.linspace(-30, 14, 10_000)
    x = np.concatenate([x.astype(np.float32), np.array([0, 1, -1.5, 2.0**-24, 3 * 2.0**-25])])
    expected = x.astype(np.float32).astype(dtype)
    _assert_same_bits({"x": float64.rounded(x, dtype)}, {"x": expected}, dtype)

    stored = np.abs(expected.astype(np.float64))
    stored = stored[stored > 2.0**-10]
    step = float64.unit(stored, dtype)
    for sign in (1, -1):
        for nudge, steps in ((1 - 1e-15, 0), (1 + 1e-15, 1)):
            rounded = float64.rounded(sign * nudge * (stored + step / 2), dtype)
            np.testing.assert_array_equal(
                rounded.astype(np.float64), sign * (stored + steps * step)
            )


def test_task_arithmetic_at_one_over_n_is_averaging():
    base, others = _hurting_model("float32", 8)
    mean, _ = _merged_and_expected(Averaging(), base, others)
    sum_of_eighths, _ = _merged_and_expected(TaskArithmetic(scale=1 / 8), base, others)
    for name in base:
        np.testing.assert_allclose(mean[name], sum_of_eighths[name], rtol=1e-5, atol=1e-5)


def test_a_trim_that_keeps_nothing_gives_the_base():
    base, others = _hurting_model("float32", 3)
    assert sum(leaf.size for leaf in base.values()) * 0.0003 < 1
    merged, _ = _merged_and_expected(Ties(density=0.0003), base, others)
    _assert_same_bits(merged, base, "TIES with int(density * d) = 0")


def test_equal_magnitudes_at_the_cut_are_all_kept():
    base = {"leaf": np.zeros(10, np.float32)}
    expert = {"leaf": np.array([5, -4, 3, -3, 3, 2, 1, -1, 0, 0], np.float32)}
    merged, _ = _merged_and_expected(Ties(density=0.3), base, [expert])
    np.testing.assert_array_equal(merged["leaf"], [5, -4, 3, -3, 3, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "zero_sign, negatives, expected",
    [
        ("majority", 1, 2.0),
        ("majority", 2, -2.0),  # as many of each: zero acts as negative
        ("majority", 3, -2.0),
        ("positive", 3, 2.0),
        ("none", 1, 0.0),
    ],
)
def test_a_vote_of_zero(zero_sign: str, negatives: int, expected: float):
    signs = np.array([1, 1] + [-1] * negatives, np.float32)
    base = {"votes": np.zeros(signs.shape, np.float32), "zero": np.zeros(2, np.float32)}
    experts = [
        {"votes": signs, "zero": np.array([2, -2], np.float32)},
        {"votes": signs, "zero": np.array([-2, 2], np.float32)},
    ]
    merged, _ = _merged_and_expected(Ties(density=1.0, zero_sign=zero_sign), base, experts)
    np.testing.assert_array_equal(merged["zero"], [expected, expected])
    np.testing.assert_array_equal(merged["votes"], signs)


def test_dare_drops_and_rescales():
    tau = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    base, expert = {"leaf": np.zeros_like(tau)}, {"leaf": tau}
    kept = _oracle_masks(Dare(density=0.25), base)(0, "leaf")
    assert 150 < kept.sum() < 350
    merged, _ = _merged_and_expected(Dare(density=0.25, scale=1.0), base, [expert])
    np.testing.assert_array_equal(merged["leaf"], np.where(kept, 4 * tau, 0))
    merged, _ = _merged_and_expected(Dare(density=0.25, scale=1.0, rescale="l1"), base, [expert])
    np.testing.assert_array_equal(np.asarray(merged["leaf"]) != 0, kept)
    np.testing.assert_allclose(np.abs(merged["leaf"]).sum(), np.abs(tau).sum(), rtol=1e-5)


# ---- what a method asks, and what it refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, trim_fraction, trim_scope, asks_majority, asks_l1",
    [
        (Averaging(), None, "model", False, False),
        (TaskArithmetic(), None, "model", False, False),
        (Ties(), 0.2, "model", True, False),
        (Ties(density=0.3, scope="tensor", zero_sign="none"), 0.3, "tensor", False, False),
        (Dare(), None, "model", False, False),
        (Dare(rescale="l1"), None, "model", False, True),
        (DareTies(), None, "model", True, False),
        (DareTies(trim_density=0.1, zero_sign="positive", rescale="l1"), 0.1, "model", False, True),
    ],
    ids=repr,
)
def test_what_a_method_asks_of_the_survey(
    method: Method, trim_fraction: float | None, trim_scope: str, asks_majority: bool, asks_l1: bool
):
    assert method.trim_fraction == trim_fraction
    assert method.trim_scope == trim_scope
    assert method.asks_majority == asks_majority
    assert method.asks_l1 == asks_l1
    assert method.asks_survey == (trim_fraction is not None or asks_majority or asks_l1)


@each_method
def test_refuses_numbers_out_of_range(cls: type[Method]):
    fields = {field.name for field in dataclasses.fields(cls)}
    refused = [
        (field, value) for field in ("density", "trim_density") for value in (0.0, 2.0, -0.5)
    ]
    refused += [("density", float("nan")), ("scale", float("nan")), ("scale", float("inf"))]
    for field, value in refused:
        if field in fields:
            with pytest.raises(ValueError, match=rf"{cls.__name__}\.{field} is {value}"):
                cls(**{field: value})
    for weights in ((1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ValueError, match=rf"{cls.__name__}\.weights are .*finite"):
            cls(weights=weights)


@pytest.mark.parametrize("cls", (Ties, DareTies))
def test_a_vote_refuses_negative_weights(cls: type[Method]):
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.weights are .*no negative weights"):
        cls(weights=(1.0, -1.0))


@pytest.mark.parametrize("cls", (Averaging, TaskArithmetic, Dare))
@pytest.mark.parametrize(
    "weights", ((1.0, -1.0), (1.0, -1.0 + 2.0**-30))
)  # in float32 all the same
def test_a_mean_refuses_weights_that_sum_to_zero(cls: type[Method], weights: tuple[float, ...]):
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.weights are .*their sum is 0"):
        cls(weights=weights, combine="mean")
    cls(weights=(1.0, -1.0), combine="sum")


@pytest.mark.parametrize("cls", (Dare, DareTies))
def test_one_division_needs_one_density(cls: type[Method]):
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.density is .*one density"):
        cls(density=(0.5, 0.2))
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.density is .*fraction kept"):
        cls(density=(0.5, 0.0), rescale="l1")
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.density has 2 numbers for 3 experts"):
        cls(density=(0.5, 0.2), rescale="none").check(3)


@each_method
def test_lists_are_taken_as_tuples(cls: type[Method], unchecked_annotations: None):
    """gin gives lists; a method must hash."""
    assert hash(cls(weights=[1.0, 2.0])) == hash(cls(weights=(1.0, 2.0)))


@pytest.fixture
def unchecked_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user calls it: the checker that tests install would refuse a wrong type first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@each_method
def test_refuses_an_unknown_choice(cls: type[Method], unchecked_annotations: None):
    for field, choices in _choices(cls).items():
        message = (
            rf"{cls.__name__}\.{field} is 'minority': choose one of {re.escape(repr(choices[0]))}"
        )
        with pytest.raises(ValueError, match=message):
            cls(**{field: "minority"})


@each_method
def test_refuses_another_number_of_experts(cls: type[Method]):
    with pytest.raises(ValueError, match=f"{cls.__name__} merges experts, and there are none"):
        cls().check(0)
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.weights has 2 numbers for 3 experts"):
        cls(weights=(1.0, 2.0)).check(3)
    cls().check(1)
    cls(weights=(1.0, 2.0)).check(2)


# ---- settings ----------------------------------------------------------------------------------------------------


def _choices(cls: type[Method]) -> dict[str, tuple[str, ...]]:
    """The fields that are one of a few words."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: typing.get_args(hints[field.name])
        for field in dataclasses.fields(cls)
        if typing.get_origin(hints[field.name]) is typing.Literal
    }


def _settings(cls: type[Method], *, experts: int) -> list[Method]:
    """All combinations of words ("combine" in turn), without and with weights, and each number's values one at a time."""
    fields = {field.name for field in dataclasses.fields(cls)}
    choices = _choices(cls)
    combine = itertools.cycle(choices.pop("combine"))
    if not choices:
        choices["combine"] = _choices(cls)["combine"]
    words = [
        {"combine": next(combine)} | dict(zip(choices, combination, strict=True))
        for combination in itertools.product(*choices.values())
    ]
    numbers = [{field: value} for field in fields & set(VALUES) for value in VALUES[field]]
    weights = [{"weights": None}, {"weights": WEIGHTS[:experts]}, {"weights": (1.0,) * experts}]
    combinations = itertools.chain(
        itertools.product(words, [{}], weights[:2]), itertools.product([{}], numbers, weights)
    )
    return [cls(**chosen | number | weight) for chosen, number, weight in combinations]


def _corner_settings(cls: type[Method], *, experts: int) -> list[Method]:
    """The defaults, and two with no default left."""
    fields = {field.name for field in dataclasses.fields(cls)}
    numbers = {"density": 0.9, "scale": 1 / 3, "trim_density": 0.4, "weights": WEIGHTS[:experts]}
    others = {"density": 0.3, "scale": 0.7, "trim_density": 0.3}
    return [
        cls(),
        cls(**{f: v for f, v in others.items() if f in fields}),
        cls(
            **{f: v for f, v in numbers.items() if f in fields},
            **{field: choices[-1] for field, choices in _choices(cls).items()},
        ),
    ]


# ---- models ------------------------------------------------------------------------------------------------------


def _hurting_model(dtypes: str, experts: int) -> tuple[Model, list[Model]]:
    """Shapes and values at which merges go wrong; the largest leaf fills vector registers."""
    base_dtype, expert_dtypes = DTYPES[dtypes]
    random = np.random.default_rng(experts)
    cancelling, same = slice(0, 8), slice(8, 12)
    values = random.normal(0, 1, 1000) * 2.0 ** random.integers(-20, 10, 1000)
    values[cancelling] = random.integers(-8, 8, 8) / 8
    base = {
        "empty": np.zeros((3, 0)),
        "equal": random.integers(-32, 32, (7, 5)) / 64,
        "one": random.normal(0, 0.02, (1,)),
        "scalar": random.normal(0, 0.02, ()),
        "values": values,
    }
    base = {name: np.asarray(leaf).astype(base_dtype) for name, leaf in base.items()}

    def moved(name: str, i: int) -> np.ndarray:
        leaf = np.asarray(base[name], np.float64)
        if name == "equal":  # exact in every dtype, and three magnitudes: many tie at any cut
            return leaf + random.integers(-2, 3, leaf.shape) / 64
        result = np.asarray(leaf + random.normal(0, 1, leaf.shape) * (0.1 * abs(leaf) + 1e-3))
        if name == "values":
            result[same] = leaf[same]
            # Exact, and zero in the sum over an even number of experts.
            result[cancelling] = leaf[cancelling] + (-1) ** i * np.arange(8) / 8
        return result

    return base, [
        {n: moved(n, i).astype(expert_dtypes[i % len(expert_dtypes)]) for n in base}
        for i in range(experts)
    ]


def _realistic_model(experts: int) -> tuple[Model, list[Model]]:
    """2^20 bfloat16 weights as fine-tuned models have them."""
    random = np.random.default_rng(experts)
    base = random.normal(0, 0.02, (1024, 1024)).astype(np.float32).astype(BFLOAT16)
    return {"leaf": base}, [
        {"leaf": (base + random.normal(0, 1e-3, base.shape).astype(np.float32)).astype(BFLOAT16)}
        for _ in range(experts)
    ]


# ---- merging a model with a method alone, without the engine -------------------------------------------------------


def _merged_and_expected(method: Method, base: Model, experts: list[Model]) -> tuple[Model, Model]:
    facts = _surveys_and_keys(method, base, experts)
    expected = float32.merge(base, experts, method, _oracle_masks(method, base))
    return _merge_jitted(method, base, experts, *facts), expected


def _oracle_masks(method: Method, base: Model) -> Masks:
    shapes = {name: leaf.shape for name, leaf in base.items()}
    return oracle_masks.masks(shapes, seed=SEED, density=getattr(method, "density", 1.0))


def _surveys_and_keys(
    method: Method, base: Model, experts: list[Model], masks_: Masks | None = None
) -> tuple[dict[str, Survey], dict[str, list[np.ndarray]]]:
    """Per leaf: what the engine's survey would say, as the oracle finds it, and each expert's mask key."""
    found = float32.explain(base, experts, method, masks_ or _oracle_masks(method, base))
    surveys = {
        name: Survey(
            thresholds=tuple(jnp.float32(threshold[name]) for threshold in found.thresholds),
            majority=jnp.float32(found.majority) if method.asks_majority else None,
            l1=tuple(jnp.float32(ratio[name]) for ratio in found.l1),
        )
        for name in base
    }
    keys = {
        name: [masks.tensor_key(seed=SEED, expert=i, path=name) for i in range(len(experts))]
        for name in base
    }
    return surveys, keys


def _merge_leaves(
    method: Method,
    base: Model,
    experts: list[Model],
    surveys: dict[str, Survey],
    keys: dict[str, list[np.ndarray]],
) -> dict[str, Array]:
    return {
        name: _merge_leaf(
            method, leaf, [expert[name] for expert in experts], surveys[name], keys[name]
        )
        for name, leaf in base.items()
    }


def _merge_leaf(
    method: Method,
    base: np.ndarray,
    experts: Sequence[np.ndarray],
    survey: Survey,
    keys: Sequence[np.ndarray],
    *,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
) -> Array:
    base, *experts = map(jnp.asarray, (base, *experts))
    index = element_index(
        base.shape,
        _row_major(base.shape) if strides is None else strides,
        (jnp.uint32(offset), jnp.uint32(0)),
        wide=False,
    )

    def draw(expert: int, keep: Array) -> Array:
        key0, key1 = jnp.asarray(keys[expert])
        return masks.keep_mask(key0, key1, index.low, index.high, keep)

    return method(base, tuple(experts), survey=survey, draw=draw)


_merge_jitted = jax.jit(_merge_leaves)


def _draw(
    seed: int, experts: Sequence[int], path: str, shape: tuple[int, ...], method: Method
) -> list[np.ndarray]:
    """Whole masks, for leaves too big for the oracle's."""
    index = element_index(shape, _row_major(shape), (jnp.uint32(0), jnp.uint32(0)), wide=False)
    keep = jnp.float32(getattr(method, "density", 1.0))
    keys = [masks.tensor_key(seed=seed, expert=i, path=path) for i in experts]
    return [np.asarray(masks.keep_mask(*map(jnp.uint32, key), *index, keep)) for key in keys]


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def _bits(array: Array | np.ndarray) -> bytes:
    return np.asarray(array).tobytes()


def _assert_same_bits(merged: Model, expected: Model, what: object) -> None:
    assert sorted(merged) == sorted(expected)
    for name in expected:
        found, wanted = np.asarray(merged[name]), np.asarray(expected[name])
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        if _bits(found) != _bits(wanted):
            raise AssertionError(f"{what}: {name} is\n{found}\nand should be\n{wanted}")
