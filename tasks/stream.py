"""The examples of a mixture, epoch by epoch, in an order that depends on nothing but the seed.

An epoch takes from each task as many examples as its mixing rate says: all of a dataset of at most the cap, once in
every prompt's words, or the cap's share of a larger one, another share each epoch. Tasks are mixed by a random
permutation, not by chance, so that an epoch holds exactly those. Any stretch of an epoch can be asked for: that is how
a saved position comes back.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf

from tasks import catalog, instructions, mixing, preprocessors, registry, row_source
from tasks.packing import Lengths, Tokens, truncate

# Examples that TensorFlow hands over in one call, which costs as much as some ten of them.
BATCH = 64


class NoExamples(ValueError):
    """A mixture that gives nothing in a split."""


class Stream:
    """Examples of a mixture as tokens.

    Args:
      mixture: a registered mixture or task.
      split: the split; held-out datasets have none to train on.
      lengths: of inputs and targets.
      seed: of the order.
      truncation: see `packing.truncate`.
      rate_cap: see `mixing`.

    Raises:
      ValueError: for an unknown mixture, a split that it lacks, or a held-out dataset in what is trained on; NoExamples for
        a split without any.
    """

    def __init__(
        self,
        mixture: str,
        *,
        split: str = "train",
        lengths: Lengths,
        seed: int = 0,
        truncation: str = "end",
        rate_cap: int = mixing.RATE_CAP,
    ) -> None:
        self.mixture, self.split, self.lengths, self.seed = mixture, split, lengths, seed
        self.truncation, self.rate_cap = truncation, rate_cap
        names = registry.task_names(mixture)
        if split == "train":
            refuse_held_out(mixture, names)
        self.tasks = [task for task in map(seqio.TaskRegistry.get, names) if split in task.splits]
        if not self.tasks:
            raise ValueError(f"no task of {mixture} has a split {split!r}")
        if not len(self):
            raise NoExamples(f"{mixture} has no {split} example")

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """[tasks] examples that an epoch takes from each."""
        infos = registry.task_infos()
        return np.array(
            [
                mixing.examples_per_epoch(
                    row_source.count(task, self.split),
                    prompts=len(infos[task.name].dataset.prompts) if task.name in infos else 1,
                    cap=self.rate_cap,
                )
                for task in self.tasks
            ]
        )

    def __len__(self) -> int:
        """Examples of an epoch."""
        return int(self.counts.sum())

    def take(self, epoch: int, first: int = 0, last: int | None = None) -> Iterator[Tokens]:
        """Examples `first` to `last` of an epoch."""
        order = self._order(epoch)
        skipped = np.bincount(order[:first], minlength=len(self.tasks))
        readers: dict[int, Iterator[tuple[np.ndarray, np.ndarray]]] = {}
        for number in order[first:last]:
            if number not in readers:
                readers[number] = self._read(self.tasks[number], epoch, int(skipped[number]))
            parts = next(readers[number], None)
            if parts is not None:  # else the prompt has passed over some rows
                yield truncate(*parts, lengths=self.lengths, rule=self.truncation)

    def _order(self, epoch: int) -> np.ndarray:
        """[examples] the task of each example of an epoch."""
        numbers = np.repeat(np.arange(len(self.tasks), dtype=np.uint16), self.counts)
        return np.random.default_rng([self.seed, epoch]).permutation(numbers)

    def _read(
        self, task: seqio.Task, epoch: int, skipped: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of a task's examples, in the order of the epoch. Raises ValueError for a malformed row."""
        key = hashlib.sha256(f"{self.seed} {epoch} {task.name}".encode()).digest()
        # tf.data wants a positive int32
        dataset = _shuffled(task, self.split, int.from_bytes(key[:4], "little") >> 1)
        dataset = dataset.skip(skipped).map(lambda element: (element["inputs"], element["targets"]))
        with preprocessors.told():
            for many in dataset.ragged_batch(BATCH):
                columns = [
                    np.split(part.values.numpy(), part.row_splits.numpy()[1:-1]) for part in many
                ]
                yield from zip(*columns, strict=True)


@functools.lru_cache(maxsize=256)
def _shuffled(task: seqio.Task, split: str, seed: int) -> tf.data.Dataset:
    """A task's examples; built once, which takes half a second: a multitask mixture holds all that its categories do."""
    return task.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=True,
        seed=seed,
        use_cached=task.supports_caching and task.cache_dir is not None,
        try_in_mem_cache=False,
    )


def refuse_held_out(mixture: str, names: tuple[str, ...], *, use: str = "trained on") -> None:
    """Raises ValueError if something to be trained on, or chosen by, holds a held-out dataset."""
    infos = registry.task_infos()
    held_out = {}
    for name in names:
        found = instructions.held_out_in(name, infos[name].dataset if name in infos else None)
        if found:
            held_out[found] = name
    if held_out:
        raise ValueError(
            f"{mixture} can't be {use}: it holds {', '.join(held_out)}, held out to judge by (as {', '.join(held_out.values())})."
            f" Take {catalog.HELD_IN} or one of its categories."
        )
