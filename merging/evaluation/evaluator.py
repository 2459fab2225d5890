"""Models scored on tasks in device memory: tokenised, batched and compiled once, parameters are an argument.

  evaluator = Evaluator(model, tasks, mesh=mesh)
  results = evaluator(params, "expert_a")              one model, sharded as the mesh says
  results = evaluator.many(stacked, ["m1", "m2"])      small ones, a leading axis over models in every array, shared out over the mesh

Rows of all tasks lie together in batches of few shapes, so that a task of a hundred examples costs no more than they do. Results are
those of any mesh to 1e-5 in log-probability; rows that only fill up a batch are dropped by their numbers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from merging import partitioning
from merging.evaluation.collect import Normalization, Result, result
from merging.evaluation.examples import Task
from merging.evaluation.generate import Prompts, continued
from merging.evaluation.rows import (
    PromptRow,
    Row,
    Shape,
    batch_size,
    choice_rows,
    few_shapes,
    shape_of,
    stacked,
)
from merging.evaluation.score import Choices, score
from merging.models.decoder import Decoder, boxed_params
from merging.paths import of_leaves

# Calls on their way to the devices, beyond which the host waits: enough to keep them busy.
IN_FLIGHT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How models are run and choices compared.

    Attributes:
      normalization: see `collect.Normalization`.
      bidirectional: a prompt's tokens see one another in both directions, as they do in training (prefix-LM).
      row_length: the most tokens of one row: of a prompt with a choice, or with what is generated.
      batch_tokens: tokens of a batch, over all devices that share it, padding included.
      shapes: the most shapes that choices, and prompts, are put into; each is compiled once.
      vocabulary_chunks: see `loss.token_scores`.
    """

    normalization: Normalization = "sum"
    bidirectional: bool = False
    row_length: int = 2_048
    batch_tokens: int = 4_096
    shapes: int = 4
    vocabulary_chunks: int = 1

    def __post_init__(self) -> None:
        known = ("sum", "tokens", "unconditional")
        if self.normalization not in known:
            raise ValueError(f"normalization is {self.normalization!r}: it must be one of {known}")
        for name in ("row_length", "batch_tokens", "shapes", "vocabulary_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows of one shape, and the step that runs them.

    Attributes:
      step: (params, arrays) -> outputs; one object for each compiled shape.
      arrays: numpy, [B, ...].
      slots: where the outputs go: [B, N] numbers of choices, or [B] of examples; -1 nowhere.
      examples: how many end with this batch, for progress.
    """

    step: _Step
    arrays: Any
    slots: np.ndarray
    examples: int


@dataclasses.dataclass(frozen=True)
class _Step:
    """A pure function of (params, arrays), which can be compiled."""

    kind: str
    max_new_tokens: int = 0
    eos_id: int | None = None


class Evaluator:
    """Scores models of one architecture on some tasks.

    Attributes:
      forward_seconds: of all calls, from the first step's start until the last one's results were on the host.
    """

    def __init__(
        self,
        model: Decoder,
        tasks: Sequence[Task],
        *,
        mesh: Mesh | None = None,
        options: Options | None = None,
    ):
        """Makes all rows and batches; compiles nothing.

        Args:
          model: whose parameters will be given; float32 or not, log-probabilities are float32.
          tasks: of different (name, prompt).
          mesh: default: the first device alone.
          options: default `Options()`.

        Raises ValueError for examples that don't fit into a row, with task and example.
        """
        twice = [key for key, n in collections.Counter(task.key for task in tasks).items() if n > 1]
        if twice:
            raise ValueError(f"tasks {twice} are given twice")
        self.model = model.clone(
            config=dataclasses.replace(model.config, remat="none", dropout_rate=0.0)
        )
        self.tasks = list(tasks)
        self.mesh = partitioning.MeshShape().mesh(jax.devices()[:1]) if mesh is None else mesh
        self.options = Options() if options is None else options
        self._shardings = partitioning.shardings(boxed_params(self.model), self.mesh)
        self._paths = of_leaves(self._shardings)
        self._rows = {task.key: self._rows_of(task) for task in self.tasks}
        self._shapes = {kind: self._few_shapes(kind) for kind in (Row, PromptRow)}
        self._placed: dict[tuple[int, bool], Any] = {}
        self._batches: dict[tuple[bool, tuple], list[_Batch]] = {}
        self._compiled: dict[tuple[_Step, bool], Callable] = {}
        self.forward_seconds = 0.0

    # ---- what a user calls ---------------------------------------------------------------------------------------

    def __call__(
        self,
        params: Any,
        model_id: str,
        *,
        tasks: Sequence[Task] | None = None,
        progress: Callable[[int], None] = lambda examples: None,
    ) -> list[Result]:
        """The results of one model on all tasks, or on some of them.

        Args:
          params: the model's tree, placed anywhere.
          model_id: names it in scores and errors.
          tasks: of those that the evaluator was made with.
          progress: called with the number of examples that are done.

        Raises ValueError for parameters that are not finite, with their names.
        """
        params = jax.device_put(params, self._shardings)
        (results,) = self._run(params, [model_id], tasks, progress, is_many=False)
        return results

    def many(
        self,
        stacked_params: Any,
        model_ids: Sequence[str],
        *,
        tasks: Sequence[Task] | None = None,
        progress: Callable[[int], None] = lambda examples: None,
    ) -> list[list[Result]]:
        """The results of several models, each on a device as a whole; their number is a multiple of the mesh's devices.

        Args:
          stacked_params: the model's tree with a leading axis over models in every array.
          model_ids: one for each. The other arguments are those of `__call__`.
        """
        devices = self.mesh.size
        if len(model_ids) % devices:
            raise ValueError(
                f"{len(model_ids)} models can't be shared out evenly over {devices} devices: fill up with copies, or give"
                " the evaluator a smaller mesh"
            )
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return self._run(
            jax.device_put(stacked_params, sharding), model_ids, tasks, progress, is_many=True
        )

    @property
    def shapes(self) -> dict[str, list[Shape]]:
        """(tokens, targets) of the rows of choices, and (tokens,) of prompts that are continued."""
        return {"choices": self._shapes[Row], "prompts": self._shapes[PromptRow]}

    def tokens(self, tasks: Sequence[Task] | None = None) -> int:
        """Tokens of all rows of the tasks, without padding, and without what is generated."""
        return sum(
            row.shape[0]
            for task in (self.tasks if tasks is None else tasks)
            for row in self._rows[task.key]
        )

    def padded_tokens(self) -> int:
        """The same of all tasks, with padding."""
        return sum(
            batch.arrays.tokens.size for batch in self._batches_of(self.tasks, is_many=False)
        )

    # ---- rows and batches ----------------------------------------------------------------------------------------

    def _rows_of(self, task: Task) -> list[Row | PromptRow]:
        """A task's rows, whose slots count its choices (examples, where generated) from 0; unconditional ones follow."""
        rows: list[Row | PromptRow] = []
        slot = 0
        try:
            for number, example in enumerate(task.examples):
                where = example.id
                if task.kind == "generate":
                    if len(example.prompt) + task.max_new_tokens > self.options.row_length:
                        raise ValueError(
                            f"a prompt of {len(example.prompt):,} tokens and {task.max_new_tokens:,} to be generated don't fit"
                            f" into {self.options.row_length:,}"
                        )
                    rows.append(PromptRow(example.prompt, number, task.max_new_tokens, task.eos_id))
                    continue
                rows += choice_rows(
                    example.prompt,
                    example.choices,
                    first_slot=slot,
                    row_length=self.options.row_length,
                )
                slot += len(example.choices)
            if self._is_unconditional(task):
                where = "without prompts"
                start = task.examples[0].prompt[:1]
                for choice in _distinct(task):
                    rows += choice_rows(
                        start,
                        [np.array(choice)],
                        first_slot=slot,
                        row_length=self.options.row_length,
                    )
                    slot += 1
        except ValueError as error:
            raise ValueError(
                f"task {task.name}, prompt {task.prompt}, example {where}: {error}; shorten TASK_FEATURE_LENGTHS, which cuts"
                " and counts, or raise ROW_LENGTH where the model has learnt such positions"
            ) from error
        return rows

    def _is_unconditional(self, task: Task) -> bool:
        return task.kind == "rank" and self.options.normalization == "unconditional"

    def _cost(self, shapes: np.ndarray) -> np.ndarray:
        """About the operations of one row of each shape, [n, dims] -> [n]."""
        c = self.model.config
        table = 2 * c.vocab_size * c.embed_dim
        tokens = shapes[:, 0].astype(np.float64)
        block = 2 * (c.num_params() - c.vocab_size * c.embed_dim)
        seen = 4 * c.num_layers * c.num_heads * (c.head_dim + 8)
        reads = shapes[:, 1] if shapes.shape[1] > 1 else 1
        return tokens * block + tokens * tokens * seen + reads * table

    def _few_shapes(self, kind: type) -> list[Shape]:
        found = [row.shape for rows in self._rows.values() for row in rows if isinstance(row, kind)]
        return few_shapes(found, most=self.options.shapes, cost=self._cost) if found else []

    def _batches_of(self, tasks: Sequence[Task], *, is_many: bool) -> list[_Batch]:
        """All rows of the tasks in batches, for one model or for many; slots count over all tasks."""
        key = (is_many, tuple(task.key for task in tasks))
        if key not in self._batches:
            self._batches[key] = list(self._make_batches(tasks, is_many))
        return self._batches[key]

    def _make_batches(self, tasks: Sequence[Task], is_many: bool) -> Iterator[_Batch]:
        rows: dict[tuple[_Step, Shape], list[tuple[int, Row | PromptRow]]] = (
            collections.defaultdict(list)
        )
        for task, offset in zip(tasks, self._offsets(tasks), strict=True):
            for row in self._rows[task.key]:
                if isinstance(row, Row):
                    step = _Step("choices")
                else:
                    step = _Step("prompts", row.max_new_tokens, row.eos_id)
                shape = shape_of(row.shape, self._shapes[type(row)], self._cost)
                rows[step, shape].append((offset, row))
        multiple = 1 if is_many else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for (step, shape), members in sorted(
            rows.items(), key=lambda item: (item[0][0].kind, item[0][1])
        ):
            most = max(1, self.options.batch_tokens // shape[0])
            size = batch_size(len(members), most=most, multiple=multiple)
            for start in range(0, len(members), size):
                yield _batch(step, shape, members[start : start + size], size)

    def _offsets(self, tasks: Sequence[Task]) -> list[int]:
        """The number of each task's first slot; those of choices and of examples are counted apart."""
        offsets, counts = [], collections.Counter()
        for task in tasks:
            kind = task.kind == "generate"
            offsets.append(counts[kind])
            counts[kind] += self._slots(task)
        return offsets

    def _slots(self, task: Task) -> int:
        if task.kind == "generate":
            return len(task.examples)
        choices = sum(len(example.choices) for example in task.examples)
        return choices + (len(_distinct(task)) if self._is_unconditional(task) else 0)

    # ---- programs ------------------------------------------------------------------------------------------------

    def _program(self, step: _Step, *, is_many: bool) -> Callable:
        """The jitted step, of one model, or of models along a leading axis, some on each device."""
        if (step, is_many) in self._compiled:
            return self._compiled[step, is_many]
        if step.kind == "choices":
            one = functools.partial(
                score,
                self.model,
                bidirectional=self.options.bidirectional,
                vocabulary_chunks=self.options.vocabulary_chunks,
            )
        elif step.kind == "prompts":

            def one(params: Any, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
                found = continued(
                    self.model,
                    params,
                    prompts,
                    max_new_tokens=step.max_new_tokens,
                    eos_id=step.eos_id,
                    bidirectional=self.options.bidirectional,
                )
                return found.tokens, found.lengths
        else:

            def one(params: Any, arrays: None) -> jax.Array:
                return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)])

        whole = partitioning.replicated(self.mesh)
        if is_many:
            models = PartitionSpec(self.mesh.axis_names)

            def each(params: Any, arrays: Any) -> Any:
                return jax.lax.map(lambda mine: one(mine, arrays), params)

            mapped = jax.shard_map(
                each,
                mesh=self.mesh,
                in_specs=(models, PartitionSpec()),
                out_specs=models,
                check_vma=False,
            )
            program = jax.jit(mapped, out_shardings=whole)
        else:
            jitted = jax.jit(one, out_shardings=whole)

            def program(params: Any, arrays: Any) -> Any:
                with partitioning.use(self.mesh):
                    return jitted(params, arrays)

        self._compiled[step, is_many] = program
        return program

    def _place(self, batch: _Batch, *, is_many: bool) -> Any:
        """A batch's arrays on the devices, where they stay."""
        key = (id(batch), is_many)
        if key not in self._placed:
            if is_many:
                shardings = jax.tree.map(lambda x: partitioning.replicated(self.mesh), batch.arrays)
            else:
                shardings = partitioning.batch_shardings(batch.arrays, self.mesh)
            self._placed[key] = jax.tree.map(
                lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]),
                batch.arrays,
                shardings,
            )
        return self._placed[key]

    # ---- a run ---------------------------------------------------------------------------------------------------

    def _run(
        self,
        params: Any,
        model_ids: Sequence[str],
        tasks: Sequence[Task] | None,
        progress: Callable[[int], None],
        *,
        is_many: bool,
    ) -> list[list[Result]]:
        tasks = self.tasks if tasks is None else list(tasks)
        started = time.monotonic()
        finite = self._program(_Step("finite"), is_many=is_many)(params, None)
        batches = self._batches_of(tasks, is_many=is_many)
        begun = time.monotonic()
        outputs: list[Any] = []
        done = 0
        for number, batch in enumerate(batches):
            program = self._program(batch.step, is_many=is_many)
            outputs.append(program(params, self._place(batch, is_many=is_many)))
            if number >= IN_FLIGHT:
                jax.block_until_ready(outputs[number - IN_FLIGHT])
                done += batches[number - IN_FLIGHT].examples * len(model_ids)
                progress(done)
        fetched = jax.device_get(outputs)
        self.forward_seconds += time.monotonic() - begun
        self._check_finite(np.asarray(finite).reshape(len(model_ids), -1), model_ids)
        seconds = (time.monotonic() - started) / len(model_ids)
        progress(sum(len(task.examples) for task in tasks) * len(model_ids))
        return [
            self._results(
                model_id,
                tasks,
                batches,
                _of_model(fetched, i) if is_many else fetched,
                seconds,
            )
            for i, model_id in enumerate(model_ids)
        ]

    def _check_finite(self, finite: np.ndarray, model_ids: Sequence[str]) -> None:
        for model_id, each in zip(model_ids, finite, strict=True):
            bad = [path for path, good in zip(self._paths, each, strict=True) if not good]
            if bad:
                raise ValueError(
                    f"model {model_id}: parameters that are infinite or not a number in {', '.join(bad)}: nothing it says"
                    " would mean anything"
                )

    def _results(
        self,
        model_id: str,
        tasks: Sequence[Task],
        batches: Sequence[_Batch],
        outputs: Sequence[Any],
        seconds: float,
    ) -> list[Result]:
        sums, unlikely, texts = self._collected(tasks, batches, outputs)
        costs = [self._task_cost(task) for task in tasks]
        total = sum(costs)
        results = []
        for task, offset, cost in zip(tasks, self._offsets(tasks), costs, strict=True):
            share = seconds * cost / total
            if task.kind == "generate":
                mine = texts[offset : offset + len(task.examples)]
                decoded = [task.decode(tokens) for tokens in mine]
                results.append(result(task, model_id, texts=decoded, seconds=share))
                continue
            counts = [len(example.choices) for example in task.examples]
            ends = np.cumsum(counts)
            mine = sums[offset : offset + self._slots(task)]
            log_probs = np.split(mine[: ends[-1]], ends[:-1])
            is_greedy = np.split(unlikely[offset : offset + ends[-1]] == 0, ends[:-1])
            unconditional = None
            if self._is_unconditional(task):
                places = {choice: i for i, choice in enumerate(_distinct(task))}
                alone = mine[ends[-1] :]
                unconditional = [
                    np.array([alone[places[tuple(choice.tolist())]] for choice in example.choices])
                    for example in task.examples
                ]
            results.append(
                result(
                    task,
                    model_id,
                    log_probs=log_probs,
                    is_greedy=is_greedy,
                    unconditional=unconditional,
                    normalization=self.options.normalization,
                    seconds=share,
                )
            )
        return results

    def _task_cost(self, task: Task) -> float:
        rows = self._rows[task.key]
        costs = self._cost(np.array([row.shape for row in rows]))
        more = (
            self._cost(np.array([[1]]))[0] * task.max_new_tokens if task.kind == "generate" else 0
        )
        return float(costs.sum() + more * len(rows))

    def _collected(
        self, tasks: Sequence[Task], batches: Sequence[_Batch], outputs: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
        """Of every choice log-probability (float64) and how many of its tokens aren't the likeliest; of every generated answer its
        tokens, without the end.
        """
        counts: Mapping[bool, int] = collections.Counter()
        for task in tasks:
            counts[task.kind == "generate"] += self._slots(task)
        sums, unlikely = np.zeros(counts[False]), np.zeros(counts[False])
        texts: list[list[int]] = [[] for _ in range(counts[True])]
        for batch, out in zip(batches, outputs, strict=True):
            if batch.step.kind == "choices":
                is_meant = batch.slots >= 0
                slots = batch.slots[is_meant]
                log_probs, is_likeliest = (each[is_meant] for each in out)
                sums += np.bincount(slots, weights=log_probs, minlength=len(sums))
                unlikely += np.bincount(slots, weights=~is_likeliest, minlength=len(sums))
                continue
            tokens, lengths = out
            for row, slot in enumerate(batch.slots):
                if slot >= 0:
                    found = tokens[row, : lengths[row]].tolist()
                    if found and found[-1] == batch.step.eos_id:
                        found.pop()
                    texts[slot] = found
        return sums, unlikely, texts


def _of_model(outputs: Sequence[Any], number: int) -> list[Any]:
    return [jax.tree.map(lambda x: x[number], out) for out in outputs]


def _distinct(task: Task) -> list[tuple[int, ...]]:
    """A task's different choices, in the order of their first use."""
    return list(dict.fromkeys(tuple(c.tolist()) for each in task.examples for c in each.choices))


def _batch(
    step: _Step, shape: Shape, members: Sequence[tuple[int, Row | PromptRow]], size: int
) -> _Batch:
    rows = [row for _, row in members]
    if step.kind == "prompts":
        lengths = np.ones(size, np.int32)
        lengths[: len(rows)] = [len(row.tokens) for row in rows]
        tokens = stacked([row.tokens for row in rows], rows=size, length=shape[0])
        slots = np.full(size, -1)
        slots[: len(rows)] = [offset + row.slot for offset, row in members]
        return _Batch(step, Prompts(tokens, lengths), slots, len(rows))
    length, reads = shape
    fill = functools.partial(stacked, rows=size)
    arrays = Choices(
        tokens=fill([row.tokens for row in rows], length=length),
        segment_ids=fill([row.segment_ids for row in rows], length=length),
        positions=fill([row.positions for row in rows], length=length),
        reads=fill([row.reads for row in rows], length=reads),
        targets=fill([row.targets for row in rows], length=reads),
    )
    slots = np.full((size, reads), -1)
    for place, (offset, row) in zip(slots, members, strict=False):
        place[: len(row.slots)] = row.slots + offset
    return _Batch(step, arrays, slots, len(rows))
