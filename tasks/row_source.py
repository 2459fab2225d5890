"""Sources as seqio DataSources.

What has random access (`RowSource`) is shuffled as a whole under the seed and shards by row, so two hosts of two read
disjoint rows that add up to the stream of one. TFDS is seqio's own source. An element of RowSource is {"row": JSON};
one of TFDS is its nested features. `preprocessors.as_json` makes one of both.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf

from tasks import sources


def data_source(
    source: sources.Source, *, folder: str | pathlib.Path | None = None
) -> seqio.DataSource:
    """The one door from a description to seqio.

    Args:
      source: where rows come from.
      folder: where JSON lines lie.
    """
    if isinstance(source, sources.Tfds):
        return _TfdsSource(source)
    return RowSource(source, folder=folder)


def count(task: seqio.Task, split: str) -> int:
    """How many rows a task's split has, as it is read here (`num_input_examples` may tell what was declared).

    Raises:
      ValueError: for a task of others whose source doesn't know.
    """
    source = task.source
    size = source.count(split) if hasattr(source, "count") else source.num_input_examples(split)
    if size is None:
        raise ValueError(
            f"the source of {task.name} does not know how many {split} examples it has"
        )
    return size


class _TfdsSource(seqio.TfdsDataSource):
    """seqio's, with the sizes that are declared: a rate or a listing needs no download."""

    def __init__(self, source: sources.Tfds) -> None:
        super().__init__(tfds_name=source.name, splits=dict(source.splits))
        self._sizes = source.sizes

    def num_input_examples(self, split: str) -> int:
        return self._sizes[split]

    def count(self, split: str) -> int:
        return self.tfds_dataset.size(split)


class RowSource(seqio.DataSource):
    """Rows with random access; nothing is read before the first of them is wanted."""

    def __init__(self, source: sources.Source, *, folder: str | pathlib.Path | None = None) -> None:
        super().__init__(splits=source.splits, performs_internal_shuffling=True)
        self._source, self._folder = source, folder
        self._rows: Callable[[str], Sequence[sources.Row]] = functools.lru_cache(maxsize=4)(
            functools.partial(sources.rows, source, folder=folder)
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def num_input_examples(self, split: str) -> int:
        return (getattr(self._source, "sizes", None) or {}).get(split) or len(self._rows(split))

    def count(self, split: str) -> int:
        return len(self._rows(split))

    @property
    def files(self) -> Sequence[pathlib.Path]:
        """The files of JSON lines."""
        return sources.files(self._source, folder=self._folder)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: object,
    ) -> tf.data.Dataset:
        """Rows in order, or in an order that the seed alone decides; each of n shards has every n-th."""
        rows = self._rows(split)
        order = (
            np.random.default_rng(seed).permutation(len(rows)) if shuffle else np.arange(len(rows))
        )
        if shard_info is not None:
            order = order[shard_info.index :: shard_info.num_shards]

        def told(index: int) -> bytes:
            where = {
                ROW_NUMBER: index,
                ROW_PLACE: sources.place(self._source, rows, index),
            }
            return json.dumps({**rows[index], **where}, default=str).encode()

        def blocks() -> Iterator[dict[str, np.ndarray]]:
            for first in range(0, len(order), BLOCK):
                texts = [told(int(index)) for index in order[first : first + BLOCK]]
                yield {"row": np.array(texts, object)}

        dataset = tf.data.Dataset.from_generator(
            blocks, output_signature={"row": tf.TensorSpec((None,), tf.string)}
        ).unbatch()
        return dataset.apply(tf.data.experimental.assert_cardinality(len(order)))


# The columns that every row gets: its number in the split, and where it stands, for messages.
ROW_NUMBER, ROW_PLACE = "row_number", "row_place"

# Rows that TensorFlow takes from Python in one call.
BLOCK = 64
