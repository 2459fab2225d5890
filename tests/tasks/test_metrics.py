"""Metrics on cases worked out by hand, and their standard errors against resampling."""

from __future__ import annotations

import numpy as np
import pytest

from tasks import metrics


def test_accuracy():
    values = metrics.accuracy([0, 1, 1, 2], [0, 1, 0, 2])
    assert values["accuracy"] == 0.75
    assert values["accuracy_stderr"] == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    assert np.isnan(metrics.accuracy([1], [1])["accuracy_stderr"])
    with pytest.raises(ValueError, match="0 truths and 0 predictions"):
        metrics.accuracy([], [])
    with pytest.raises(ValueError, match="2 truths and 1 predictions"):
        metrics.accuracy([1, 2], [1])


def test_f1_of_choice_one():
    values = metrics.accuracy_and_f1([1, 1, 0, 0, 1], [1, 0, 1, 0, 1])
    assert values["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.accuracy_and_f1([0, 0], [0, 0])["f1"] == 0


def test_the_error_of_f1_is_that_of_resampling():
    rng = np.random.default_rng(0)
    truths = rng.random(400) < 0.6
    predictions = np.where(rng.random(400) < 0.8, truths, ~truths)
    values = metrics.accuracy_and_f1(truths.astype(int), predictions.astype(int))
    f1s = []
    for _ in range(2000):
        i = rng.integers(0, 400, 400)
        both = truths[i].sum() + predictions[i].sum()
        f1s.append(2 * (truths[i] & predictions[i]).sum() / both)
    assert values["f1_stderr"] == pytest.approx(np.std(f1s), rel=0.1)


@pytest.mark.parametrize(
    ("references", "prediction", "exact", "f1"),
    [
        (["The Red Boat!"], "red boat", 1, 1),
        (
            ["a boat", "red boats"],
            "the red boat",
            0,
            2 / 3,
        ),  # the best of: 1 of (2, 1), 1 of (2, 2)
        (["boat"], "ship", 0, 0),
        (["the"], "", 1, 1),  # both are empty when normalized
        (["boat"], "", 0, 0),
    ],
)
def test_squad(references: list[str], prediction: str, exact: float, f1: float):
    values = metrics.squad([references], [prediction])
    assert (values["exact_match"], values["f1"]) == (exact, pytest.approx(f1))


def test_rouge_takes_the_best_reference():
    values = metrics.rouge([["a cat sat", "dogs ran home"], ["x y"]], ["The dog runs home", "x y"])
    assert values["rouge1"] == pytest.approx((2 * 2 / 7 + 1) / 2)  # stemmed: dog, home; "ran" stays
    assert values["rougeLsum"] == pytest.approx((2 * 2 / 7 + 1) / 2)
    assert set(values) == {f"{k}{s}" for k in metrics.ROUGES for s in ("", "_stderr")}


def test_bleu_is_sacrebleus():
    import sacrebleu

    references = [["the cat sat on the mat .", "a cat sat ."], ["it rains a lot in may here ."]] * 5
    predictions = ["the cat sat on a mat .", "it rains a lot in may ."] * 5
    values = metrics.bleu_and_rouge(references, predictions)
    streams = [[r[0] for r in references], [r[1] if len(r) > 1 else None for r in references]]
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score / 100)
    assert 0 < values["bleu_stderr"] < 0.1
    assert values == metrics.bleu_and_rouge(references, predictions)


def test_ranked_by_scores():
    targets = [(0, 0, False), (0, 1, True), (1, 0, True), (1, 1, False), (1, 2, False)]
    assert metrics.ranked(targets, [-3.0, -1.0, -2.0, -2.0, -9.0]) == ([1, 0], [1, 0])
    shuffled = [targets[i] for i in (4, 1, 0, 3, 2)]
    assert metrics.ranked(shuffled, [-9.0, -1.0, -3.0, -2.0, -2.0]) == ([1, 0], [1, 0])
    values = metrics.METRICS["accuracy"].from_scores(targets, [-1.0, -3.0, -1.0, -2.0, -9.0])
    assert values["accuracy"] == 0.5


def test_a_text_as_a_choice():
    example = {"choices": [b"New  York", b"Rome"], "label": 1, "references": [b"Rome"]}
    ranked, generated = metrics.METRICS["accuracy"], metrics.METRICS["squad"]
    assert ranked.postprocess("", example=example, is_target=True) == 1
    assert ranked.postprocess("New York", example=example, is_target=False) == 0
    assert ranked.postprocess("Paris", example=example, is_target=False) == -1
    assert generated.postprocess("", example=example, is_target=True) == ["Rome"]
