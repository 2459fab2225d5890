"""From an element of a source to the features of a task: render by a prompt, tokenize, end the targets.

Every element of a task has, beside `inputs` and `targets` as tokens and as text (`*_pretokenized`): `choices` [k] and
`references` [r] (strings; k is 0 where the answer is generated), `label` (int32, -1 where generated) and `id` (string).
The features of `rank_classification`, one element for each choice, are said there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks.dataset import Dataset
from tasks.row_source import ROW_NUMBER

Transform = Callable[[tf.data.Dataset], tf.data.Dataset]

TEXT = {"inputs": (), "targets": (), "choices": (None,), "references": (None,), "id": ()}


def render(dataset: Dataset, prompt: str) -> Transform:
    """Elements of a source -> strings, in Python, row by row."""

    def rendered(number: np.ndarray, *leaves: Any, structure: Any) -> tuple[Any, ...]:
        row = as_row(tf.nest.pack_sequence_as(structure, leaves))
        example = dataset.render(prompt, row)
        name = str(row.get("id") or row.get(ROW_NUMBER, int(number)))
        label = -1 if example.label is None else example.label
        return (
            example.inputs.encode(),
            example.targets.encode(),
            np.array([each.encode() for each in example.choices], object),
            np.array([each.encode() for each in example.references], object),
            name.encode(),
            np.int32(label),
        )

    def transform(elements: tf.data.Dataset) -> tf.data.Dataset:
        structure = elements.element_spec

        def one(number: tf.Tensor, element: Any) -> dict[str, tf.Tensor]:
            values = tf.numpy_function(
                lambda *given: rendered(*given, structure=structure),
                [number, *tf.nest.flatten(element)],
                [tf.string] * len(TEXT) + [tf.int32],
            )
            features = dict(zip([*TEXT, "label"], values, strict=True))
            for name, shape in {**TEXT, "label": ()}.items():
                features[name] = tf.ensure_shape(features[name], shape)
            return features

        return elements.enumerate().map(one, num_parallel_calls=1)

    return transform


def as_row(element: Mapping[str, Any]) -> dict[str, Any]:
    """A row as prompts want it: of {"row": JSON}, or of the nested arrays of TFDS (bytes become strings, arrays lists)."""
    if set(element) == {"row"}:
        return json.loads(element["row"])
    return {name: _plain(value) for name, value in element.items()}


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Adds tokens; the text stays as `*_pretokenized`."""
    return seqio.preprocessors.tokenize(dataset, output_features)


def rank_classification(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """One element for each choice, T5's form: what seqio.Evaluator scores.

    Before tokenization. Targets are the choice; added are `idx` [2] (number of the example, number of the choice), `is_correct` (bool)
    and `choices_count`.
    """

    def expand(number: tf.Tensor, example: dict[str, tf.Tensor]) -> tf.data.Dataset:
        choices = example["choices"]
        count = tf.size(choices)
        position = tf.range(count)
        repeated = {
            name: tf.repeat(value[None], count, axis=0)
            for name, value in example.items()
            if name != "targets"
        }
        return tf.data.Dataset.from_tensor_slices(
            {
                **repeated,
                "targets": choices,
                "idx": tf.stack([tf.repeat(tf.cast(number, tf.int32), count), position], axis=1),
                "is_correct": tf.equal(position, example["label"]),
                "choices_count": tf.repeat(count, count),
            }
        )

    return dataset.enumerate().flat_map(expand)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tf.RaggedTensor):
        return _plain(value.to_list())
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
