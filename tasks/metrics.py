"""Metrics with standard errors, as functions of truths and predictions: each is a seqio metric_fn.

All values are fractions between 0 and 1 (ROUGE and BLEU too, where others print them times 100), and beside every `x`
stands `x_stderr`: of a mean, its standard error; of F1, by the delta method over examples; of corpus BLEU, by 1,000
bootstrap samples with a fixed seed. One example has no standard error (NaN).

A truth is the index of the right choice where answers are ranked, and the sequence of all right answers where they are
generated; a prediction is the index of a choice (-1 for a text that is no choice), or a text.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Values = dict[str, float]


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> Values:
    """The share of right choices."""
    _check(targets, predictions)
    return _mean("accuracy", np.equal(targets, predictions))


def accuracy_and_f1(targets: Sequence[int], predictions: Sequence[int]) -> Values:
    """Accuracy, and F1 of choice 1 (GLUE's for paraphrases); F1 is 0 where choice 1 neither occurs nor is predicted."""
    is_true, is_predicted = np.equal(targets, 1), np.equal(predictions, 1)
    twice_found = 2.0 * (is_true & is_predicted)
    both = is_true.astype(float) + is_predicted
    f1 = twice_found.sum() / max(both.sum(), 1.0)
    n = len(targets)
    residual = twice_found - f1 * both
    spread = np.sqrt(n / (n - 1) * np.square(residual).sum()) if n > 1 else np.nan
    return {
        **accuracy(targets, predictions),
        "f1": float(f1),
        "f1_stderr": float(spread / max(both.sum(), 1.0)),
    }


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Values:
    """Exact match and token F1, the best over all right answers (SQuAD 1.1's script, arXiv 1606.05250)."""
    _check(targets, predictions)
    exact, f1 = [], []
    for references, prediction in zip(targets, predictions, strict=True):
        words = normalized(prediction).split()
        wanted = [normalized(reference).split() for reference in references]
        exact.append(any(words == each for each in wanted))
        f1.append(max(_token_f1(each, words) for each in wanted))
    return {**_mean("exact_match", exact), **_mean("f1", f1)}


def rouge(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Values:
    """ROUGE-1, -2 and -Lsum F-measures with stemming, the best over all references (google-research's rouge_score)."""
    _check(targets, predictions)
    scorer = _rouge_scorer()
    scores = [
        scorer.score_multi([_by_sentence(each) for each in references], _by_sentence(prediction))
        for references, prediction in zip(targets, predictions, strict=True)
    ]
    values: Values = {}
    for kind in ROUGES:
        values |= _mean(kind, [score[kind].fmeasure for score in scores])
    return values


def bleu_and_rouge(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Values:
    """Corpus BLEU over all references (sacrebleu's defaults: 13a tokens, exponential smoothing), and ROUGE."""
    _check(targets, predictions)
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=False)
    by_sentence = BLEU(effective_order=True)  # the same counts; without, it warns of each sentence
    sentences = [
        by_sentence.sentence_score(prediction, list(references))
        for references, prediction in zip(targets, predictions, strict=True)
    ]
    # [examples, 10]: matches and totals of 1- to 4-grams, lengths of prediction and of the closest reference.
    counts = np.array(
        [[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in sentences]
    )

    def corpus(sums: np.ndarray) -> float:
        sums = [int(each) for each in sums]
        score = bleu.compute_bleu(
            correct=sums[:4], total=sums[4:8], sys_len=sums[8], ref_len=sums[9], smooth_method="exp"
        )
        return score.score / 100

    n = len(counts)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_SAMPLES)
    spread = np.std([corpus(sums) for sums in weights @ counts], ddof=1) if n > 1 else np.nan
    return {
        "bleu": corpus(counts.sum(axis=0)),
        "bleu_stderr": float(spread),
        **rouge(targets, predictions),
    }


BOOTSTRAP_SAMPLES = 1_000
ROUGES = ("rouge1", "rouge2", "rougeLsum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """How a dataset is judged.

    Attributes:
      function: (targets, predictions) -> values.
      main: the value that enters the study's scores.
      is_ranked: choices are ranked; else answers are generated.
    """

    function: Callable[[Sequence[Any], Sequence[Any]], Values]
    main: str
    is_ranked: bool

    def postprocess(self, decoded: str, *, example: Mapping[str, Any], is_target: bool) -> Any:
        """seqio's postprocess_fn: a truth where `is_target`, else a prediction, from decoded text."""
        if not self.is_ranked:
            return _texts(example["references"]) if is_target else decoded
        if is_target:
            return int(example["label"])
        choices = [" ".join(each.split()) for each in _texts(example["choices"])]
        text = " ".join(decoded.split())
        return choices.index(text) if text in choices else -1

    @property
    def from_scores(self) -> Callable[..., Values]:
        """The same metric of rank_classification's elements: one score for each choice of each example."""

        def by_scores(targets: Sequence[tuple[int, int, bool]], scores: Sequence[float]) -> Values:
            labels, predictions = ranked(targets, scores)
            return self.function(labels, predictions)

        return by_scores


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(function=accuracy, main="accuracy", is_ranked=True),
    "accuracy_and_f1": Metric(function=accuracy_and_f1, main="accuracy", is_ranked=True),
    "squad": Metric(function=squad, main="f1", is_ranked=False),
    "rouge": Metric(function=rouge, main="rougeLsum", is_ranked=False),
    "bleu": Metric(function=bleu_and_rouge, main="bleu", is_ranked=False),
}


def ranked_target(
    decoded: str, *, example: Mapping[str, Any], is_target: bool
) -> tuple[int, int, bool] | str:
    """postprocess_fn of the rank_classification form: (number of the example, number of the choice, is it right)."""
    if not is_target:
        return decoded
    number, choice = (int(each) for each in example["idx"])
    return number, choice, bool(example["is_correct"])


def ranked(
    targets: Sequence[tuple[int, int, bool]], scores: Sequence[float]
) -> tuple[list[int], list[int]]:
    """Labels and predictions of rank_classification's elements. The highest score wins, the first of equal ones."""
    best: dict[int, tuple[float, int]] = {}
    labels: dict[int, int] = {}
    for (number, choice, is_correct), score in zip(targets, scores, strict=True):
        if is_correct:
            labels[number] = choice
        if number not in best or (-score, choice) < best[number]:
            best[number] = (-score, choice)
    numbers = sorted(best)
    return [labels[each] for each in numbers], [best[each][1] for each in numbers]


def normalized(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(each for each in text.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(wanted: Sequence[str], found: Sequence[str]) -> float:
    if not wanted or not found:
        return float(wanted == found)
    common = sum((collections.Counter(wanted) & collections.Counter(found)).values())
    return 2 * common / (len(wanted) + len(found))


def _by_sentence(text: str) -> str:
    """One sentence a line, as ROUGE-Lsum reads them."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


@functools.cache
def _rouge_scorer() -> Any:
    from nltk.stem import porter
    from rouge_score import rouge_scorer, tokenizers

    # The default tokenizer, whose stemmer took most of the time, with what it found kept.
    tokenizer = tokenizers.DefaultTokenizer(use_stemmer=True)
    stemmer = porter.PorterStemmer()
    tokenizer._stemmer = _Remembering(stemmer)
    return rouge_scorer.RougeScorer(ROUGES, tokenizer=tokenizer)


class _Remembering:
    """A stemmer that stems each word once."""

    def __init__(self, stemmer: Any) -> None:
        self.stem = functools.lru_cache(maxsize=100_000)(stemmer.stem)


def _mean(name: str, values: Sequence[float] | np.ndarray) -> Values:
    values = np.asarray(values, np.float64)
    n = len(values)
    stderr = values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return {name: float(values.mean()), f"{name}_stderr": float(stderr)}


def _check(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    if len(targets) != len(predictions) or not len(targets):
        raise ValueError(
            f"{len(targets)} truths and {len(predictions)} predictions: wanted as many, and at least one"
        )


def _texts(strings: Sequence[bytes | str]) -> list[str]:
    return [each.decode("utf-8") if isinstance(each, bytes) else str(each) for each in strings]
