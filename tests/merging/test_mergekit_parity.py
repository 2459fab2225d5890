"""The same merges as mergekit 0.1.5's, on a tiny Llama made by transformers; skips without the extra `peers`.

In float32, from the same folders, with scope="tensor" and zero_sign="positive" (and DARE by mergekit's own masks, which
come from torch's global state and are recorded as it draws them), linear, task arithmetic, TIES and DARE are equal bit
for bit where both do the same arithmetic. What differs, each shown by a test below:

  linear           With weights other than 1, torch's addcmul rounds a product and its sum once together, not each:
                   a fifth of the elements differ, by at most 3 * 2^-24 (|theta_0| + sum |w_i tau_i|).
  sums             From 5 experts on, torch adds in another order what is left of a tensor when its vector registers
                   are full (up to 31 elements), so those may differ by one rounding.
  TIES             Equal magnitudes at the cut: mergekit keeps int(density * d) entries, whichever its sort brings up;
                   here all equal ones are kept. Where int(density * d) is 0 it keeps one entry; here none.
  DARE             mergekit restores the L1 norm by a quotient of float32 sums; here the sums are exact. With its
                   quotient the result is equal bit for bit, with ours within 5 * 2^-24 (|theta_0| + |lambda| sum
                   |w_i tau_i|). It has no division by the share kept: rescaling nothing and lambda / density in place
                   of lambda is the same, bit for bit where density is a power of two.
  dare_ties        It sums the entries that agree unless `normalize: true` is set (ties has it set); here, as in the
                   papers, they are averaged.
  bfloat16         Its arithmetic, and so its trim and its vote, is in the type of `dtype`, but for linear, which is in
                   float32 and equal bit for bit. `test_bfloat16_errors` prints its error against the float64 oracle and
                   ours. Seen, in units in the last place: task arithmetic 0.36 and 0.24 (0.24 is the final rounding),
                   TIES 0.57 and 0.01 (task vectors of 8 bits tie at the cut in great number), dare_linear 0.37 and 0.22,
                   dare_ties 0.39 and 0.16.

A tied lm_head, absent from the inputs, is in neither output. An lm_head present in some of them only is not compared:
mergekit takes the embedding in its place, here it is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import merging
from merging.methods.averaging import Averaging
from merging.methods.dare import Dare
from merging.methods.dare_ties import DareTies
from merging.methods.method import Method, Survey, each_density
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from tests.oracle import float32, float64
from tests.oracle.float32 import Model

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
NEEDED = "compares with mergekit, of the extra `peers`: pip install -e '.[test,peers]'"
torch = pytest.importorskip("torch", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)
mergekit = pytest.importorskip("mergekit.merge", reason=NEEDED)
task_arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")

pytestmark = pytest.mark.peers

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VOTE_OF_ZERO = "model.layers.0.self_attn.q_proj.weight"  # two experts cancel in its first row


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """A base and its experts: their folders, as transformers writes them, and what is in them."""

    base: pathlib.Path
    experts: tuple[pathlib.Path, ...]

    def leaves(self) -> tuple[Model, list[Model]]:
        return read(self.base), [read(folder) for folder in self.experts]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What mergekit made, and the keep masks that it drew: per leaf one for each expert."""

    merged: Model
    drawn: Mapping[str, list[np.ndarray]]

    def masks(self, expert: int, leaf: str) -> np.ndarray:
        return self.drawn[leaf][expert]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A base and three experts, float32."""
    return make(tmp_path_factory.mktemp("float32"), dtype="float32")


# ---- float32: the same merge, bit for bit --------------------------------------------------------------------------


def test_linear_is_averaging(checkpoints: Checkpoints, tmp_path: pathlib.Path):
    theirs = run_mergekit("linear", checkpoints, tmp_path)
    assert_equal(run_ours(Averaging(), checkpoints, tmp_path), theirs.merged)


def test_linear_with_weights_is_averaging_with_fused_products(
    checkpoints: Checkpoints, tmp_path: pathlib.Path
):
    weights = (0.3, 1.0, 1.7)
    theirs = run_mergekit("linear", checkpoints, tmp_path, weights=weights)
    method = Averaging(weights=weights)
    assert_near(run_ours(method, checkpoints, tmp_path), theirs, checkpoints, method)

    _, experts = checkpoints.leaves()
    divisor = float32.ordered_sum([np.float32(weight) for weight in weights])
    fused = {}
    for name in theirs.merged:
        total = np.float32(0)
        for weight, expert in zip(weights, experts, strict=True):
            # In float64 the product is exact, so that the sum is the only rounding.
            product = np.float64(np.float32(weight)) * expert[name].astype(np.float64)
            total = (total + product).astype(np.float32)
        fused[name] = total / divisor
    assert_equal(fused, theirs.merged)


@pytest.mark.parametrize("weights", (None, (0.3, -1.0, 1.7)))
@pytest.mark.parametrize("scale", (1.0, 0.4, 1 / 3))
def test_task_arithmetic(
    scale: float,
    weights: Sequence[float] | None,
    checkpoints: Checkpoints,
    tmp_path: pathlib.Path,
):
    theirs = run_mergekit("task_arithmetic", checkpoints, tmp_path, weights=weights, scale=scale)
    method = TaskArithmetic(scale=scale, weights=weights)
    assert_equal(run_ours(method, checkpoints, tmp_path), theirs.merged)


@pytest.mark.parametrize("weights", (None, (0.3, 1.0, 1.7)))
@pytest.mark.parametrize("density, scale", ((0.2, 1.0), (0.5, 0.7), (1.0, 0.7)))
def test_ties(
    density: float,
    scale: float,
    weights: Sequence[float] | None,
    checkpoints: Checkpoints,
    tmp_path: pathlib.Path,
):
    method = Ties(
        density=density, scale=scale, weights=weights, scope="tensor", zero_sign="positive"
    )
    base, experts = checkpoints.leaves()
    assert_no_ties_at_the_cut(base, experts, density)
    row = [expert[VOTE_OF_ZERO][0] - base[VOTE_OF_ZERO][0] for expert in experts]
    assert (sum(row) == 0).all() and (row[0] != 0).all()
    theirs = run_mergekit(
        "ties", checkpoints, tmp_path, weights=weights, scale=scale, density=density
    )
    assert_equal(run_ours(method, checkpoints, tmp_path), theirs.merged)


@pytest.mark.parametrize("name, scale", (("dare_linear", 0.4), ("dare_ties", 1.0)))
@pytest.mark.parametrize("density", (0.5, 0.3))
def test_dare_with_their_masks_and_l1_norms(
    density: float, name: str, scale: float, checkpoints: Checkpoints, tmp_path: pathlib.Path
):
    theirs = run_mergekit(name, checkpoints, tmp_path, scale=scale, density=density)
    method = dare(name, density=density, scale=scale, rescale="l1")
    assert_near(call_all(method, checkpoints, theirs), theirs, checkpoints, method)
    assert_equal(call_all(method, checkpoints, theirs, l1_ratio=l1_ratio_of_torch), theirs.merged)


@pytest.mark.parametrize("name, scale", (("dare_linear", 0.4), ("dare_ties", 1.0)))
@pytest.mark.parametrize("density", (0.5, 0.3))
def test_dare_with_their_masks_and_inverse_keep(
    density: float, name: str, scale: float, checkpoints: Checkpoints, tmp_path: pathlib.Path
):
    """mergekit can't divide by the share kept, but it can rescale nothing, and lambda take its place."""
    theirs = run_mergekit(
        name, checkpoints, tmp_path, scale=scale / density, density=density, rescale=False
    )
    method = dare(name, density=density, scale=scale, rescale="inverse_keep")
    ours = call_all(method, checkpoints, theirs)
    assert_near(ours, theirs, checkpoints, method)
    if density == 0.5:  # a power of two: nothing is rounded by dividing
        assert_equal(ours, theirs.merged)


def test_ties_where_the_trim_keeps_nothing(checkpoints: Checkpoints, tmp_path: pathlib.Path):
    """In tensors of less than 100 entries at a density of 0.01: mergekit keeps one entry of each expert, here none is."""
    method = Ties(density=0.01, scope="tensor", zero_sign="positive")
    theirs = run_mergekit("ties", checkpoints, tmp_path, density=0.01).merged
    ours = run_ours(method, checkpoints, tmp_path)
    base, experts = checkpoints.leaves()
    small = [name for name, leaf in base.items() if leaf.size < 100]
    assert len(small) == 5  # two norms in each layer, and the last one
    for name in small:
        np.testing.assert_array_equal(ours[name], base[name])
        assert 1 <= np.count_nonzero(theirs.pop(name) != ours.pop(name)) <= len(experts)
    assert_equal(ours, theirs)


def test_dare_ties_sums_by_default(checkpoints: Checkpoints, tmp_path: pathlib.Path):
    """mergekit's, unless told to normalize, adds the entries that agree: up to N times what their mean is."""
    theirs = run_mergekit(
        "dare_ties", checkpoints, tmp_path, density=0.5, rescale=False, normalize=None
    )
    base, experts = checkpoints.leaves()
    vectors, _ = float32.drop(float32.task_vectors(base, experts), theirs.masks, "none")
    signs, _ = float32.elect(vectors, None, "positive")
    agreeing = {
        name: float32.ordered_sum(
            [np.where(np.sign(v[name]) == sign, v[name], np.float32(0)) for v in vectors]
        )
        for name, sign in signs.items()
    }
    assert_equal(float32.add(base, 1.0, agreeing), theirs.merged)


def test_tied_embeddings_are_written_once(tmp_path: pathlib.Path):
    """Neither writes an lm_head where the inputs have none."""
    tied = make(tmp_path / "tied", dtype="float32", is_tied=True)
    theirs = run_mergekit("task_arithmetic", tied, tmp_path, scale=0.4)
    assert "lm_head.weight" not in theirs.merged
    assert_equal(run_ours(TaskArithmetic(scale=0.4), tied, tmp_path), theirs.merged)


def test_eight_experts_are_summed_in_another_order(tmp_path: pathlib.Path):
    """By torch, where 5 or more terms meet what is left of a tensor after its vector registers are full."""
    eight = make(tmp_path / "eight", dtype="float32", experts=8)
    theirs = run_mergekit("task_arithmetic", eight, tmp_path, scale=0.4)
    method = TaskArithmetic(scale=0.4)
    ours = run_ours(method, eight, tmp_path)
    assert_near(ours, theirs, eight, method)
    for name, leaf in theirs.merged.items():
        assert np.count_nonzero(ours[name] != leaf) < 32, name


# ---- bfloat16: who is nearer to the truth --------------------------------------------------------------------------


def test_bfloat16_errors(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    """Both against the float64 oracle, in units in the last place of bfloat16; the final rounding alone is 0.25."""
    checkpoints = make(tmp_path / "checkpoints", dtype="bfloat16")
    methods: dict[str, Method] = {
        "linear": Averaging(),
        "task_arithmetic": TaskArithmetic(scale=0.4),
        "ties": Ties(scope="tensor", zero_sign="positive"),
        "dare_linear": dare("dare_linear", density=0.5, scale=0.4, rescale="l1"),
        "dare_ties": dare("dare_ties", density=0.5, scale=1.0, rescale="l1"),
    }
    with capsys.disabled():
        print("\n| bfloat16: mean error, share equal to the rounded oracle | mergekit | here |")
        print("|---|---|---|")
    for name, method in methods.items():
        numbers = {field: getattr(method, field, None) for field in ("scale", "density")}
        theirs = run_mergekit(name, checkpoints, tmp_path / name, dtype="bfloat16", **numbers)
        if theirs.drawn:
            merged = call_all(method, checkpoints, theirs)
            ours = {leaf: array.astype(BFLOAT16) for leaf, array in merged.items()}
        else:
            ours = run_ours(method, checkpoints, tmp_path / name)
        exact = float64.merge(*checkpoints.leaves(), method, theirs.masks)
        their_error, their_share = error(theirs.merged, exact)
        our_error, our_share = error(ours, exact)
        with capsys.disabled():
            print(
                f"| {name} | {their_error:.3f}, {their_share:.2%} | {our_error:.3f}, {our_share:.2%} |"
            )
        if name == "linear":
            assert_equal(ours, theirs.merged)
        else:
            assert our_error < their_error and our_share > their_share, name
        assert our_share >= 0.998, name


# ---- helpers ------------------------------------------------------------------------------------------------------


def make(
    folder: pathlib.Path, *, dtype: str, experts: int = 3, is_tied: bool = False, layers: int = 2
) -> Checkpoints:
    """A Llama of few layers with random weights, and experts at a distance of 1e-3 from it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=is_tied,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    leaves = dict(model.named_parameters())  # a tied one once
    made = Checkpoints(folder / "base", tuple(folder / f"expert_{i}" for i in range(experts)))
    with torch.no_grad():
        leaves[VOTE_OF_ZERO][0] = 0.0
        model.save_pretrained(made.base)
        base = {name: leaf.clone() for name, leaf in leaves.items()}
        opposed = 0.01 * torch.randn(config.hidden_size)  # larger than what the trim drops
        for i, expert in enumerate(made.experts):
            for name, leaf in leaves.items():
                leaf.copy_(base[name].float() + 1e-3 * torch.randn(leaf.shape))
            leaves[VOTE_OF_ZERO][0] = {0: opposed, 1: -opposed}.get(i, 0.0)
            model.save_pretrained(expert)
    return made


def read(folder: pathlib.Path) -> Model:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def dare(name: str, *, density: float, scale: float, rescale: str) -> Dare | DareTies:
    """Our name for mergekit's."""
    if name == "dare_linear":
        return Dare(density=density, scale=scale, rescale=rescale)
    return DareTies(density=density, scale=scale, rescale=rescale, zero_sign="positive")


def run_ours(method: Method, checkpoints: Checkpoints, folder: pathlib.Path) -> Model:
    """The merge from disk to disk."""
    merging.merge_checkpoints(
        base=checkpoints.base,
        experts=checkpoints.experts,
        output_dir=folder / "ours",
        method=method,
    )
    return read(folder / "ours")


def call(
    methods: Mapping[str, Dare | DareTies],
    base: Model,
    experts: Sequence[Model],
    theirs: Theirs,
    *,
    l1_ratio: Any = float32.l1_ratio,
) -> Model:
    """The method of each leaf alone, float32, with mergekit's masks in place of ours; it draws none at density 1."""
    merged = {}
    for name, leaf in base.items():
        method, ratios = methods[name], []
        drawn = iter(theirs.drawn.get(name, ()))
        masks = [
            np.ones(leaf.shape, bool) if density == 1 else next(drawn)
            for density in each_density(method.density, len(experts))
        ]
        if method.rescale == "l1":
            for expert, mask in zip(experts, masks, strict=True):
                vector = expert[name].astype(np.float32) - leaf.astype(np.float32)
                kept = np.where(mask, vector, np.float32(0))
                ratios.append(jnp.float32(l1_ratio(vector, kept)))
        merged[name] = np.asarray(
            method(
                jnp.asarray(leaf),
                tuple(jnp.asarray(expert[name]) for expert in experts),
                survey=Survey(l1=tuple(ratios)),
                draw=lambda expert, keep, masks=masks: jnp.asarray(masks[expert]),
            )
        )
    return merged


def call_all(
    method: Dare | DareTies, checkpoints: Checkpoints, theirs: Theirs, **options: Any
) -> Model:
    """The same with one method for all leaves."""
    base, experts = checkpoints.leaves()
    return call(dict.fromkeys(base, method), base, experts, theirs, **options)


def l1_ratio_of_torch(before: np.ndarray, after: np.ndarray) -> float:
    """As mergekit finds it: the quotient of float32 sums."""
    return float(torch.from_numpy(before).abs().sum() / torch.from_numpy(after).abs().sum())


def run_mergekit(
    name: str,
    checkpoints: Checkpoints,
    folder: pathlib.Path,
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    density: float | None = None,
    rescale: bool | None = None,
    normalize: bool | None = True,
    dtype: str = "float32",
) -> Theirs:
    """The merge by mergekit's Python API; what is None is left to its defaults. `normalize` is for dare_ties."""
    shared = {"lambda": scale, "rescale": rescale}
    if name == "dare_ties":
        shared["normalize"] = normalize
    each = {} if density is None else {"density": density}
    per_expert = zip(checkpoints.experts, weights or [1.0] * len(checkpoints.experts), strict=True)
    config = {
        "merge_method": name,
        "dtype": dtype,
        "out_dtype": dtype,
        "parameters": {key: value for key, value in shared.items() if value is not None},
        "models": [
            {"model": str(expert), "parameters": {"weight": weight, **each}}
            for expert, weight in per_expert
        ],
    }
    if name != "linear":
        config["base_model"] = str(checkpoints.base)
    return run_config(config, folder / "theirs")


def run_config(config: Mapping[str, Any], folder: pathlib.Path) -> Theirs:
    """The merge that a configuration of mergekit's says, into a folder."""
    options = mergekit.MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=1
    )
    with recorded_masks() as drawn:
        mergekit.run_merge(mergekit.MergeConfiguration.model_validate(config), str(folder), options)
    return Theirs(read(folder), drawn)


@contextlib.contextmanager
def recorded_masks() -> Iterator[dict[str, list[np.ndarray]]]:
    """What torch.bernoulli gives while mergekit merges, by the leaf that it works on; not where it can give nothing (density 0)."""
    drawn: dict[str, list[np.ndarray]] = {}
    method = task_arithmetic.GeneralizedTaskArithmeticMerge
    merge_group, bernoulli = method.merge_group, torch.bernoulli
    leaf = ""

    def merge_group_of(self: Any, group: Any, /, **parameters: Any) -> Any:
        nonlocal leaf
        leaf = group.metadata.name
        return merge_group(self, group, **parameters)

    def recorded(probabilities: Any) -> Any:
        mask = bernoulli(probabilities)
        if probabilities.any():
            drawn.setdefault(leaf, []).append(mask.bool().numpy())
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "merge_group", merge_group_of)
        patch.setattr(torch, "bernoulli", recorded)
        yield drawn


def assert_no_ties_at_the_cut(base: Model, experts: Sequence[Model], density: float) -> None:
    for expert in experts:
        for name, leaf in base.items():
            magnitude = abs(expert[name] - leaf)
            kept = magnitude >= float32.kth_largest([magnitude], density)
            assert np.count_nonzero(kept) == int(density * leaf.size), name


def assert_equal(ours: Model, theirs: Model) -> None:
    """The same leaves, the same bits (zeros of both signs alike)."""
    assert sorted(ours) == sorted(theirs)
    for name, leaf in theirs.items():
        assert ours[name].dtype == leaf.dtype
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def assert_near(ours: Model, theirs: Theirs, checkpoints: Checkpoints, method: Method) -> None:
    """As near as 8 roundings: of each constant, quotient, product and sum, on either side."""
    assert sorted(ours) == sorted(theirs.merged)
    magnitude = float64.explain(*checkpoints.leaves(), method, theirs.masks).magnitude
    for name, leaf in theirs.merged.items():
        difference = abs(ours[name].astype(np.float64) - leaf)
        assert (difference <= 8 * 2.0**-24 * magnitude[name]).all(), name


def error(merged: Model, exact: Model) -> tuple[float, float]:
    """Mean error in units in the last place of bfloat16, and the share of elements that equal the rounded oracle."""
    assert sorted(merged) == sorted(exact)
    found = np.concatenate([merged[name].astype(np.float64).ravel() for name in exact])
    wanted = np.concatenate([leaf.ravel() for leaf in exact.values()])
    equal = float64.rounded(wanted, BFLOAT16).astype(np.float64) == found
    return float(np.mean(abs(found - wanted) / float64.unit(wanted, BFLOAT16))), float(equal.mean())
