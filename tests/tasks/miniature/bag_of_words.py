"""A linear model on bags of words.

What can be had of a ranked dataset from words, their number, position and length alone.

A choice is scored by a linear function of the words of the input (counted, and present or not) under its position
in the list, of the words of input and choice together, of its own words, of its length; softmax over the choices,
L2, full-batch Adam.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

# (inputs, choices, label)
Example = tuple[str, list[str], int]

STEPS = 250
RATE = 0.03
L2 = 1e-4


def accuracy(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Share of the test examples whose right choice scores highest, after fitting on the train examples."""
    index: dict[tuple, int] = {}
    x, labels, starts = features(train, index, grow=True)
    weights = fit(x, labels, starts)
    x, labels, starts = features(test, index, grow=False)
    scores = np.split(x @ weights[: x.shape[1]], starts[1:])
    return float(np.mean([s.argmax() == label for s, label in zip(scores, labels, strict=True)]))


def features(
    examples: Sequence[Example], index: dict[tuple, int], *, grow: bool
) -> tuple[scipy.sparse.csr_matrix, np.ndarray, np.ndarray]:
    """One line a choice, in a sparse matrix; the labels; where each example begins."""
    columns, values, ends, starts = [], [], [0], []
    for inputs, choices, _ in examples:
        starts.append(len(ends) - 1)
        asked = inputs.split()
        for position, choice in enumerate(choices):
            answer = choice.split()
            found = [("position", position, w, 1) for w in asked]
            found += [("present at", position, w, 1) for w in set(asked)]
            found += [("together", w, 1) for w in {*asked, *answer}]
            found += [("choice", w, 1) for w in answer]
            found += [("length", len(answer))]
            for *name, value in found:
                key = tuple(name)
                if grow:
                    index.setdefault(key, len(index))
                if key in index:
                    columns.append(index[key])
                    values.append(float(value))
            ends.append(len(columns))
    x = scipy.sparse.csr_matrix(
        (values, columns, ends), shape=(len(ends) - 1, max(1, len(index))), dtype=np.float64
    )
    return x, np.array([label for *_, label in examples]), np.array(starts)


def fit(x: scipy.sparse.csr_matrix, labels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Weights of the softmax over each example's choices."""
    group = np.repeat(np.arange(len(starts)), np.diff([*starts, x.shape[0]]))
    right = starts + labels
    weights, mean, square = (np.zeros(x.shape[1]) for _ in range(3))
    transposed = x.T.tocsr()
    for step in range(1, STEPS + 1):
        scores = x @ weights
        scores = np.exp(scores - np.maximum.reduceat(scores, starts)[group])
        error = scores / np.add.reduceat(scores, starts)[group]
        error[right] -= 1
        gradient = transposed @ error / len(starts) + L2 * weights
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient**2 - square)
        rate = RATE * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weights -= rate * mean / (np.sqrt(square) + 1e-8)
    return weights
