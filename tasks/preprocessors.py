"""From an element of a source to the features of a task: rendered by a prompt and tokenized, many rows at a time.

Elements have, beside `inputs` and `targets` as tokens [n] int32 and as text (`*_pretokenized`): `choices` [k] and
`references` [r] (strings; k is 0 where the answer is generated), `label` (int32, -1 where generated) and `id` (string).
In the rank_classification form, T5's, which seqio.Evaluator scores, there is one element for each choice, with the
choice as targets, and with `idx` [2] int32 (number of the example, number of the choice) and `is_correct` (bool).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.dataset import Dataset
from tasks.row_source import ROW_NUMBER, ROW_PLACE

Transform = Callable[[tf.data.Dataset], tf.data.Dataset]
Features = dict[str, Any]

# Rows that are rendered in one call from TensorFlow into Python: a call costs as much as rendering some ten rows.
BATCH = 64

# The features in the order in which Python hands them to TensorFlow.
SCALARS = {
    "inputs_pretokenized": tf.string,
    "targets_pretokenized": tf.string,
    "id": tf.string,
    "label": tf.int32,
}
RANK_SCALARS = {"is_correct": tf.bool}
VECTORS = {"inputs": tf.int32, "targets": tf.int32, "choices": tf.string, "references": tf.string}
RANK_VECTORS = {"idx": tf.int32}


def as_json(elements: tf.data.Dataset) -> tf.data.Dataset:
    """Elements of any source as {"row": JSON}: those of TFDS are nested arrays."""
    if set(elements.element_spec) == {"row"}:
        return elements
    structure = elements.element_spec

    def in_python(*leaves: Any) -> bytes:
        return json.dumps(_plain(tf.nest.pack_sequence_as(structure, leaves))).encode()

    def one(element: Any) -> dict[str, tf.Tensor]:
        row = tf.numpy_function(in_python, tf.nest.flatten(element), tf.string)
        return {"row": tf.ensure_shape(row, ())}

    return elements.map(one)


def render(
    dataset: Dataset,
    prompt: str,
    features: Mapping[str, seqio.Feature],
    *,
    is_rank_form: bool = False,
) -> Transform:
    """{"row": JSON} -> features, in the words of a prompt; no end of sequence yet."""
    scalars = {**SCALARS, **(RANK_SCALARS if is_rank_form else {})}
    vectors = {**VECTORS, **(RANK_VECTORS if is_rank_form else {})}

    def in_python(numbers: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        rendered = [
            each
            for number, row in zip(numbers, rows, strict=True)
            for each in _elements(
                dataset, prompt, features, int(number), json.loads(row), is_rank_form
            )
        ]
        columns = [
            _array((each[name] for each in rendered), kind) for name, kind in scalars.items()
        ]
        for name, kind in vectors.items():
            columns.append(_array((value for each in rendered for value in each[name]), kind))
            columns.append(np.array([len(each[name]) for each in rendered], np.int64))
        return columns

    def many(numbers: tf.Tensor, elements: dict[str, tf.Tensor]) -> Features:
        kinds = [
            *scalars.values(),
            *(each for kind in vectors.values() for each in (kind, tf.int64)),
        ]
        columns = iter(tf.numpy_function(in_python, [numbers, elements["row"]], kinds))
        found: Features = {name: tf.ensure_shape(next(columns), [None]) for name in scalars}
        for name in vectors:
            values, lengths = (tf.ensure_shape(next(columns), [None]) for _ in range(2))
            found[name] = tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)
        return found

    def dense(element: Features) -> Features:
        return {
            name: tf.ensure_shape(value, () if name in scalars else (None,))
            for name, value in element.items()
        }

    return lambda elements: elements.enumerate().batch(BATCH).map(many).unbatch().map(dense)


def _elements(
    dataset: Dataset,
    prompt: str,
    features: Mapping[str, seqio.Feature],
    number: int,
    row: dict[str, Any],
    is_rank_form: bool,
) -> list[Features]:
    """The elements that come of one row: one, or one for each choice; none where the prompt passes over it."""
    row_number = row.pop(ROW_NUMBER, number)
    place = row.pop(ROW_PLACE, f"row {row_number}")
    try:
        example = dataset.render(prompt, row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if example is None:
        return []
    shared = {
        "inputs_pretokenized": example.inputs,
        "inputs": features["inputs"].vocabulary.encode(example.inputs),
        "choices": example.choices,
        "references": example.references,
        "label": -1 if example.label is None else example.label,
        "id": str(row.get("id") or row_number),
    }
    texts = example.choices if is_rank_form else (example.targets,)
    return [
        {
            **shared,
            "targets_pretokenized": text,
            "targets": features["targets"].vocabulary.encode(text),
            "idx": (number, choice),
            "is_correct": choice == example.label,
        }
        for choice, text in enumerate(texts)
    ]


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Around whatever iterates a dataset: a ValueError of what renders rows comes out of TensorFlow as one again."""
    try:
        yield
    except tf.errors.OpError as error:
        found = re.search(
            r"ValueError: (.*?)\nTraceback \(most recent call last\)", str(error), re.DOTALL
        )
        if found is None:
            raise
        raise ValueError(found[1]) from error


def _array(values: Iterable[Any], kind: tf.DType) -> np.ndarray:
    if kind == tf.string:
        return np.array([each.encode("utf-8") for each in values], object)
    return np.array(list(values), kind.as_numpy_dtype)


def _plain(value: Any) -> Any:
    """Nested arrays of TFDS as JSON has them: bytes become strings, arrays lists."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
