"""Rank, generation and loss through the evaluator: against rows run one by one, on any mesh, and many models at once."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.evaluation import rows
from merging.evaluation.evaluator import Evaluator, Options
from merging.evaluation.examples import Example, Task
from merging.models.config import PalmConfig
from merging.models.palm import Palm
from merging.partitioning import MeshShape

V, EOS = 64, 1
MODEL = Palm(
    PalmConfig(vocab_size=V, embed_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32)
)
OPTIONS = Options(bidirectional=True, shapes=1, row_length=48, batch_tokens=160)


def accuracy(truths, predictions):
    right = np.equal(truths, predictions)
    return {"accuracy": right.mean(), "accuracy_stderr": right.std()}


def exact(truths, predictions):
    return {"exact": float(np.mean([t == p for t, p in zip(truths, predictions, strict=True)]))}


def words(tokens) -> str:
    return " ".join(map(str, tokens))


def example(number: int, choices: int, seed: int) -> Example:
    rng = np.random.default_rng([seed, number])
    made = tuple(rng.integers(2, V, rng.integers(1, 6), dtype=np.int32) for _ in range(choices))
    return Example(
        id=str(number),
        prompt=np.concatenate([[0], rng.integers(2, V, rng.integers(0, 12))]).astype(np.int32),
        choices=made,
        truth=int(rng.integers(max(choices, 1))),
        choices_text=tuple(map(words, made)),
    )


# Odd numbers of examples, fewer than devices, one choice.
TASKS = [
    Task(name="many", prompt="a", kind="rank", metric=accuracy, chance=0.3,
         examples=[example(i, 2 + i % 3, 1) for i in range(11)]),
    Task(name="few", prompt="a", kind="rank", metric=accuracy, examples=[example(0, 1, 2)]),
    Task(name="written", prompt="a", kind="generate", metric=exact, decode=words, eos_id=EOS, max_new_tokens=4,
         examples=[dataclasses.replace(example(i, 0, 3), truth="2 3") for i in range(5)]),
    Task(name="text", prompt="a", kind="loss", examples=[example(i, 1, 4) for i in range(3)]),
]  # fmt: skip


@functools.cache
def params(seed: int = 0):
    return nn.unbox(MODEL.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)))["params"]


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(MODEL, TASKS, options=OPTIONS)


@pytest.fixture(scope="module")
def results(evaluator):
    return evaluator(params(), "a")


@functools.cache
def logits_of():
    @jax.jit
    def logits(tokens, in_prompt):
        return MODEL.apply({"params": params()}, tokens[None], prefix_mask=in_prompt[None])[0]

    return logits


def logits(prompt, more) -> np.ndarray:
    """Of one row in a frame of 32, whose end nothing before it sees."""
    tokens = np.zeros(32, np.int32)
    tokens[: len(prompt) + len(more)] = [*prompt, *more]
    found = logits_of()(tokens, np.arange(32) < len(prompt))
    return np.asarray(jax.nn.log_softmax(found))[: len(prompt) + len(more)]


def test_log_probabilities_are_those_of_each_row_alone(results):
    for result in results:
        if result.task.kind == "generate":
            continue
        for each, found in zip(result.task.examples, result.choice_scores, strict=True):
            wanted = [
                logits(each.prompt, choice)[
                    len(each.prompt) - 1 + np.arange(len(choice)), choice
                ].sum()
                for choice in each.choices
            ]
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_generated_is_the_likeliest_token_by_token(results):
    result = results[2]
    for each, found in zip(result.task.examples, result.predictions, strict=True):
        written = []
        while len(written) < result.task.max_new_tokens:
            token = int(logits(each.prompt, written)[-1].argmax())
            if token == EOS:
                break
            written.append(token)
        assert found == words(written)


def test_scores_are_the_metrics_of_predictions_and_ratios_of_losses(results):
    ranked = results[0]
    truths = [each.truth for each in ranked.task.examples]
    predictions = [int(np.argmax(each)) for each in ranked.choice_scores]
    (score,) = ranked.scores
    assert (score.model, score.task, score.prompt, score.metric) == ("a", "many", "a", "accuracy")
    assert score.value == np.equal(truths, predictions).mean()
    assert (score.count, score.chance) == (11, 0.3)
    text = results[3]
    nats, bits = text.scores
    total = -sum(float(each.sum()) for each in text.choice_scores)
    assert nats.value == pytest.approx(total / sum(len(e.choices[0]) for e in text.task.examples))
    nbytes = sum(len(e.choices_text[0]) for e in text.task.examples)
    assert bits.value == pytest.approx(total / np.log(2) / nbytes)


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(data=2, fsdp=2, model=2),
        pytest.param(MeshShape(data=8), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_same(results, shape: MeshShape):
    meshed = Evaluator(MODEL, TASKS, mesh=shape.mesh(), options=OPTIONS)(params(), "a")
    assert_same(meshed, results)


def test_many_models_at_once_give_what_each_gives(evaluator):
    mesh = MeshShape(data=2).mesh(jax.devices()[:2])
    stacked = jax.tree.map(lambda *each: np.stack(each), *(params(seed) for seed in range(4)))
    many = Evaluator(MODEL, TASKS, mesh=mesh, options=OPTIONS).many(stacked, list("abcd"))
    for seed, found in enumerate(many):
        assert_same(found, evaluator(params(seed), "abcd"[seed]))


def assert_same(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.predictions == theirs.predictions or mine.task.kind == "loss"
        for a, b in zip(mine.choice_scores, theirs.choice_scores, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        if mine.task.kind != "loss":
            assert [s.value for s in mine.scores] == [s.value for s in theirs.scores]


def test_some_tasks_only(evaluator, results):
    assert_same(evaluator(params(), "a", tasks=TASKS[1:3]), results[1:3])


def test_choices_compared_by_their_mean_and_by_what_the_prompt_adds():
    by = {
        name: Evaluator(MODEL, TASKS[:1], options=dataclasses.replace(OPTIONS, normalization=name))(
            params(), "a"
        )[0]
        for name in ("sum", "tokens", "unconditional")
    }
    for i, each in enumerate(TASKS[0].examples):
        sums = by["sum"].choice_scores[i]
        lengths = [len(choice) for choice in each.choices]
        np.testing.assert_allclose(by["tokens"].choice_scores[i], sums / lengths, atol=1e-5)
        alone = [
            logits([0], choice)[np.arange(len(choice)), choice].sum() for choice in each.choices
        ]
        np.testing.assert_allclose(by["unconditional"].choice_scores[i], sums - alone, atol=1e-5)


# ---- what is refused, and ties --------------------------------------------------------------------------------------


def test_parameters_that_are_not_numbers_are_named(evaluator):
    broken = jax.tree.map(np.array, params())
    broken["final_norm"]["scale"][3] = np.nan
    with pytest.raises(ValueError, match=r"model b: .* not a number in final_norm/scale"):
        evaluator(broken, "b")


def test_of_equal_choices_the_first_counts_and_ties_are_told(evaluator, results):
    even = jax.tree.map(np.zeros_like, params())
    ranked = evaluator(even, "even", tasks=TASKS[:1])[0]
    lengths = [[len(choice) for choice in each.choices] for each in TASKS[0].examples]
    assert ranked.predictions == [int(np.argmin(each)) for each in lengths]
    assert ranked.ties == sum(each.count(min(each)) > 1 for each in lengths)
    assert ranked.ties > 0
    assert results[0].ties == 0


def test_a_prompt_beyond_the_limit_is_named():
    long = dataclasses.replace(
        TASKS[0], examples=[dataclasses.replace(example(7, 2, 1), prompt=np.zeros(48, np.int32))]
    )
    with pytest.raises(
        ValueError, match=r"task many, prompt a, example 7: .* 48 tokens .* into 48"
    ):
        Evaluator(MODEL, [long], options=dataclasses.replace(OPTIONS, row_length=48))


def test_a_task_without_examples_is_refused():
    with pytest.raises(ValueError, match="task none, prompt a has no example"):
        Task(name="none", prompt="a", kind="rank", examples=[], metric=accuracy)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_few_shapes_hold_all_rows_and_waste_little():
    rng = np.random.default_rng(0)
    found = [
        (int(t), int(n))
        for t, n in zip(rng.integers(8, 200, 500), rng.integers(2, 40, 500), strict=True)
    ]

    def cost(shapes):
        return shapes[:, 0] + 0.5 * shapes[:, 1]

    waste = []
    for most in (1, 2, 4, 8):
        shapes = rows.few_shapes(found, most=most, cost=cost)
        assert len(shapes) <= most
        chosen = np.array([rows.shape_of(each, shapes, cost) for each in found])
        assert (chosen >= np.array(found)).all()
        waste.append(cost(chosen).sum() / cost(np.array(found)).sum())
    assert waste == sorted(waste, reverse=True)
    assert waste[-1] < 1.25 < 1.8 < waste[0]


def test_batches_are_even_and_divisible():
    assert rows.batch_size(101, most=40, multiple=8) == 40  # 3 batches
    assert rows.batch_size(3, most=40, multiple=8) == 8
    assert rows.batch_size(9, most=4, multiple=1) == 3
    assert rows.batch_size(5, most=2, multiple=8) == 8
