"""Where tasks and training meet: registered mixtures as what the finetune stage trains on."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch import allocation

if TYPE_CHECKING:  # both bring what --help does without
    from merging.finetune import Mixture
    from merging.models.model_file import Vocabulary
    from merging.training.feed import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixtures:
    """Which mixtures, and how their examples become rows.

    Attributes:
      name: of a mixture or task; None where `names` are given.
      names: of several, an expert of each.
      lengths: {"inputs": tokens, "targets": tokens}.
      seed: of the order of examples and rows.
      cache_dir: where packed mixtures lie; None: ~/.cache/merging-at-scale/packed.
      stream: pack while reading, for mixtures too big to be packed once.
      truncation: what inputs that are too long lose, "end" or "start".
      validation_split: None: no validation.
      validation_rows: packed of it, at least 1.
    """

    name: str | None
    names: Sequence[str] | None
    lengths: Mapping[str, int]
    seed: int = 0
    cache_dir: str | None = None
    stream: bool = False
    truncation: str = "end"
    validation_split: str | None = "validation"
    validation_rows: int = 1_024

    def __post_init__(self) -> None:
        if self.validation_rows < 1:
            raise ValueError(f"VALIDATION_ROWS is {self.validation_rows}: it must be at least 1")

    @property
    def every(self) -> list[str]:
        """All names."""
        if (self.name is None) == (self.names is None):
            raise ValueError("give MIXTURE_OR_TASK_NAME, or MIXTURES, and not both")
        return [self.name] if self.names is None else list(self.names)


def mixtures(asked: Mixtures, registered: Mapping[str, Any], *, train_rows: int) -> list[Mixture]:
    """The mixtures, registered, packed and ready to be read.

    Args:
      asked: which.
      registered: arguments of `tasks.register`.
      train_rows: that a run will take.

    Raises ValueError for names that aren't known, held-out datasets, and mixtures without examples.
    """
    import tasks

    tasks.register(**registered)
    found = [_mixture(name, asked, registered, train_rows) for name in asked.every]
    allocation.keep_freed_memory()  # TensorFlow, which has read rows, has set it otherwise
    return found


def _mixture(name: str, asked: Mixtures, registered: Mapping[str, Any], train_rows: int) -> Mixture:
    from merging.finetune import Mixture
    from tasks import batches, identity, packing
    from tasks.stream import NoExamples, Stream

    lengths = packing.Lengths.of(asked.lengths)
    rate_cap = registered["rate_cap"]
    stream = functools.partial(
        Stream,
        name,
        lengths=lengths,
        seed=asked.seed,
        truncation=asked.truncation,
        rate_cap=rate_cap,
    )
    train = stream(split="train")
    vocabulary = train.tasks[0].output_features["targets"].vocabulary
    pack = functools.partial(
        batches.pack_mixture,
        name,
        cache_dir=asked.cache_dir or default_cache_dir(),
        lengths=lengths,
        seed=asked.seed,
        truncation=asked.truncation,
        rate_cap=rate_cap,
    )
    depends_on: dict[str, Any] = {
        "seed": asked.seed,
        "lengths": dict(asked.lengths),
        "truncation": asked.truncation,
        "rate_cap": rate_cap,
    }
    if asked.stream:
        make_train = functools.partial(_streamed, stream, "train")
        depends_on |= identity.of_tasks(task.name for task in train.tasks)
    else:
        folder = pack(split="train", max_rows=train_rows)
        make_train = functools.partial(_packed, folder, asked.seed)
        depends_on["rows"] = folder.name
    make_validation: Callable[[int, int, int], Source] | None = None
    split = asked.validation_split
    if split is not None and any(split in task.splits for task in train.tasks):
        try:
            folder = pack(split=split, max_rows=asked.validation_rows)
        except NoExamples as error:
            raise NoExamples(
                f"{error}: give another VALIDATION_SPLIT, or VALIDATION_SPLIT=None for none"
            ) from error
        make_validation = functools.partial(_packed, folder, asked.seed)
        depends_on["validation"] = folder.name
    return Mixture(
        name=name,
        train=make_train,
        validation=make_validation,
        length=lengths.row,
        vocab_size=vocabulary.vocab_size,
        vocabulary=_described(name, vocabulary, registered["vocabulary"]),
        identity=depends_on,
    )


def default_cache_dir() -> str:
    """~/.cache/merging-at-scale/packed, or where XDG_CACHE_HOME says."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return str(pathlib.Path(cache) / "merging-at-scale" / "packed")


def _described(name: str, vocabulary: Any, spec: str | None) -> Vocabulary:
    """A vocabulary as a checkpoint has it beside it."""
    from etils import epath

    from merging.models import model_file
    from tasks import vocabularies

    digest = vocabularies.digest(vocabulary)
    if spec is None:
        own = "miniature" if name.endswith("_mini") else vocabularies.BYTES
        return model_file.Vocabulary(name=own, digest=digest)
    if spec == vocabularies.BYTES:
        return model_file.Vocabulary(name=spec, digest=digest)
    path = epath.Path(spec)
    found = model_file.vocabulary_of_files(path.parent, digest=digest)
    if found is not None and path.name == found.name:
        return found
    return model_file.Vocabulary(name=path.name, digest=digest, files={path.name: path})


def _packed(folder: pathlib.Path, seed: int, batch_size: int, host: int, hosts: int) -> Source:
    from merging.training.feed import Indexed
    from tasks.batches import PackedBatches, Share

    share = Share(batch_size=batch_size, host=host, hosts=hosts)
    return Indexed(PackedBatches(folder, share=share, seed=seed).batch)


def _streamed(
    stream: Callable[..., Any], split: str, batch_size: int, host: int, hosts: int
) -> Source:
    from tasks.batches import Share

    share = Share(batch_size=batch_size, host=host, hosts=hosts)
    return _Streamed(stream(split=split), share)


@dataclasses.dataclass(frozen=True)
class _Streamed:
    """Batches that are packed as they are read, with the position behind each."""

    stream: Any
    share: Any

    def read(self, position: Mapping[str, int] | None) -> Iterator[tuple[Any, Mapping[str, int]]]:
        from tasks.batches import StreamedBatches

        reader = StreamedBatches(self.stream, share=self.share, position=position)
        for arrays in reader:
            yield arrays, dict(reader.position)
