r"""Lists tasks and mixtures, and shows examples of any of them.

  python -m launch.tasks                                            the datasets of every collection, and the mixtures
  python -m launch.tasks --collection=local --local_data=/data/sets those with suffix _local
  python -m launch.tasks sentiment_mini                             three examples of a mixture
  python -m launch.tasks copa_which --examples=5 --split=validation five of a task
  python -m launch.tasks held_in_mini --features --inputs_length=64 --targets_length=16
                                                                    packed rows, token by token
  python -m launch.tasks --describe                                 the miniature in numbers: sizes, balance of labels, majority, chance

Inputs are blue and targets green; a listing loads neither TensorFlow nor seqio. Everything else is set by gin, see
gin_configs/runs/tasks.gin: --gin.VOCABULARY='"/models/gemma/tokenizer.json"'.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from launch import command, gin_config

if TYPE_CHECKING:
    from tasks.dataset import Dataset

RUN_FILE = "gin_configs/runs/tasks.gin"

flags.adopt_module_key_flags(gin_config)

COLLECTION = flags.DEFINE_list(
    "collection",
    None,
    "List these only: study (no suffix), local, mini; default all that have rows.",
)
LOCAL_DATA = flags.DEFINE_string(
    "local_data", None, "Folder of JSON lines; short for --gin.LOCAL_DATA."
)
VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "'bytes' or a path, .model or .json; short for --gin.VOCABULARY."
)
SPLIT = flags.DEFINE_string("split", "validation", "The split that examples are of.")
EXAMPLES = flags.DEFINE_integer(
    "examples", 3, "How many examples, or rows, to show.", lower_bound=1
)
FEATURES = flags.DEFINE_bool(
    "features", False, "Show packed rows as features, not examples as text."
)
DESCRIBE = flags.DEFINE_bool(
    "describe",
    False,
    "The miniature in numbers: sizes, balance of labels, majority, chance, words.",
)
INPUTS_LENGTH = flags.DEFINE_integer("inputs_length", 1024, "Tokens of inputs, for --features.")
TARGETS_LENGTH = flags.DEFINE_integer("targets_length", 256, "Tokens of targets, for --features.")
COLOR = flags.DEFINE_enum(
    "color", "auto", ["auto", "always", "never"], "Colours; auto: if the output is a terminal."
)

BLUE, GREEN, GREY, BOLD = "34", "32", "90", "1"


def main(argv: Sequence[str]) -> None:
    """Lists, or shows one task or mixture."""
    if len(argv) > 2 or (len(argv) == 2 and DESCRIBE.value):
        raise app.UsageError(
            f"name one task or mixture, with --describe none; found {len(argv) - 1}"
        )
    command.quiet_libraries()
    try:
        arguments = configured(
            gin_config.GIN_FILE.value,
            gin_config.GIN_BINDINGS.value,
            vocabulary=VOCABULARY.value,
            local_data=LOCAL_DATA.value,
        )
        paint = painter(COLOR.value == "always" or (COLOR.value == "auto" and sys.stdout.isatty()))
        if DESCRIBE.value:
            from tasks.miniature import summary

            lines = summary.lines()
        elif len(argv) == 1:
            lines = listed(arguments, COLLECTION.value, paint)
        elif FEATURES.value:
            lines = features(argv[1], arguments, paint)
        else:
            lines = examples(argv[1], arguments, paint)
        for line in lines:
            print(line, flush=True)
    except (ValueError, OSError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            traceback.print_exc()
        sys.exit(f"Error: {error}")


def configured(
    files: Sequence[str],
    bindings: Sequence[str],
    *,
    vocabulary: str | None = None,
    local_data: str | None = None,
    search_paths: Sequence[str] = (".",),
) -> dict[str, Any]:
    """The arguments that gin and flags give `tasks.register`."""
    import tasks

    macros = {"VOCABULARY": vocabulary, "LOCAL_DATA": local_data}
    short = [f"{name} = {value!r}" for name, value in macros.items() if value is not None]
    gin_config.register(tasks.register, name="register")
    gin_config.parse([RUN_FILE, *files], [*short, *bindings], search_paths=search_paths)
    return dict(gin_config.resolve(tasks.register, name="register").arguments)


# ---- the listing ------------------------------------------------------------------------------------------------


def listed(
    arguments: dict[str, Any], collections: Sequence[str] | None, paint: Any
) -> Iterator[str]:
    """A table of datasets and one of mixtures for each collection, from the catalog alone; then the instruction mixture."""
    from tasks import catalog, mixing, p3

    folder, cap = arguments.get("local_data"), arguments.get("rate_cap", mixing.RATE_CAP)
    every = list(catalog.datasets().values())
    if arguments.get("prompts") == "p3":
        every = p3.with_p3_prompts(every)
    known = {"study" if not each else each: each for each in catalog.COLLECTIONS}
    for name in collections or known:
        if name not in known:
            raise ValueError(f"there is no collection {name!r}; known: {', '.join(known)}")
        collection = known[name]
        members = [each for each in every if collection in each.sources]
        if not members:
            continue
        yield paint(f"{name}: {len(members)} datasets, suffix {catalog.suffix(collection)!r}", BOLD)
        rows = [
            ["category", "role", "dataset", "metric", "prompts", "train", "validation", "source"]
        ]
        for category in catalog.CATEGORIES:
            for each in (each for each in members if each.category == category):
                rows.append(_dataset_row(each, collection, folder))
        yield from table(rows)
        yield ""
        rows = [["mixture", "tasks", "examples of an epoch"]]
        for mixture, inside in catalog.mixtures(every, collection).items():
            tasks_count = sum(len(each.prompts) for each in inside)
            sizes = [(each, _size(each, collection, "train", folder)) for each in inside]
            epoch = sum(
                len(each.prompts)
                * mixing.examples_per_epoch(size, prompts=len(each.prompts), cap=cap)
                for each, size in sizes
                if size is not None
            )
            is_known = all(size is not None for _, size in sizes)
            rows.append([mixture, f"{tasks_count}", f"{epoch:,}" if is_known else "?"])
        yield from table(rows)
        yield "and one for each dataset, of all its prompts, by its name and the suffix"
        yield ""
    if arguments.get("instruction_tasks"):
        yield from _instructions(arguments)


def _instructions(arguments: dict[str, Any]) -> Iterator[str]:
    """What the user named, which only seqio's registries know."""
    import tasks

    tasks.register(**arguments)

    import seqio

    from tasks import instructions, registry

    members = registry.mixtures()[instructions.MIXTURE]
    found = seqio.MixtureRegistry.get(instructions.MIXTURE)
    epoch = sum(found.get_rate(task) for task in found.tasks)
    yield from table(
        [
            ["mixture", "tasks", "examples of an epoch"],
            [instructions.MIXTURE, f"{len(members)}", f"{int(epoch):,}"],
        ]
    )
    yield f"of {', '.join(members)}"


def _dataset_row(dataset: Dataset, collection: str, folder: str | None) -> list[str]:
    from tasks import catalog

    sizes = [_size(dataset, collection, split, folder) for split in ("train", "validation")]
    return [
        dataset.category,
        catalog.role(dataset),
        dataset.name + ("" if dataset.is_counted else " (not counted)"),
        dataset.metric,
        " ".join(dataset.prompts),
        *("?" if size is None else f"{size:,}" for size in sizes),
        str(dataset.sources[collection]),
    ]


def _size(dataset: Dataset, collection: str, split: str, folder: str | None) -> int | None:
    """Rows of a split; None where they are in a folder that wasn't given."""
    from tasks import sources

    source = dataset.sources[collection]
    if split not in source.splits:
        return 0
    if hasattr(source, "sizes"):
        return source.sizes[split]
    if isinstance(source, sources.JsonLines) and folder is None:
        return None
    return len(sources.rows(source, split, folder=folder))


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned lines, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if cell.replace(",", "").isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


# ---- examples ---------------------------------------------------------------------------------------------------


def examples(name: str, arguments: dict[str, Any], paint: Any) -> Iterator[str]:
    """Examples as text: of a mixture, one of each task in turn."""
    import tasks

    tasks.register(**arguments)

    import seqio

    from tasks import preprocessors, registry

    split = SPLIT.value
    of_task = [
        (task, seqio.TaskRegistry.get(task))
        for task in registry.task_names(name)
        if split in seqio.TaskRegistry.get(task).splits
    ]
    if not of_task:
        raise ValueError(f"no task of {name} has a split {split!r}")
    yield paint(f"{name}, {split}: {', '.join(task for task, _ in of_task)}", BOLD)
    readers: dict[str, Iterator[dict[str, Any]]] = {}
    for number in range(EXAMPLES.value):
        task, provider = of_task[number % len(of_task)]
        if task not in readers:
            dataset = provider.get_dataset(None, split=split, shuffle=True, seed=0)
            readers[task] = dataset.as_numpy_iterator()
        with preprocessors.told():
            example = next(readers[task], None)
        if example is None:
            return
        yield ""
        yield paint(f"{task} {_text(example['id'])}", GREY)
        if example["inputs_pretokenized"]:
            yield paint(_text(example["inputs_pretokenized"]), BLUE)
        yield paint(_text(example["targets_pretokenized"]), GREEN)
        beside = "choices" if len(example["choices"]) else "references"
        yield paint(f"{beside}: {' | '.join(map(_text, example[beside]))}", GREY)
        yield paint(f"{len(example['inputs'])} + {len(example['targets'])} tokens", GREY)


def features(name: str, arguments: dict[str, Any], paint: Any) -> Iterator[str]:
    """The first rows that a mixture packs into, token by token."""
    import tasks

    tasks.register(**arguments)

    from tasks import mixing, packing, stream, vocabularies

    lengths = packing.Lengths(inputs=INPUTS_LENGTH.value, targets=TARGETS_LENGTH.value)
    cap = arguments.get("rate_cap", mixing.RATE_CAP)
    read = stream.Stream(name, split=SPLIT.value, lengths=lengths, rate_cap=cap)
    vocabulary = read.tasks[0].output_features["targets"].vocabulary
    start_id = vocabularies.start_id(read.tasks[0].output_features["inputs"].vocabulary)
    rows = packing.pack(read.take(0), length=lengths.row)
    for number, row in zip(range(EXAMPLES.value), rows, strict=False):
        batch = packing.batch(**packing.concatenated([row]), start_id=start_id)
        arrays = {feature: array[0] for feature, array in batch.items()}
        colors = [
            {packing.INPUT: BLUE, packing.TARGET: GREEN}.get(kind, GREY) for kind in row.kinds
        ]
        yield paint(f"row {number} of {name}: {row.segment_ids.max()} examples", BOLD)
        for segment in range(1, int(row.segment_ids.max()) + 1):
            inside = row.segment_ids == segment
            inputs = row.targets[inside & (row.kinds == packing.INPUT)]
            targets = row.targets[inside & (row.kinds == packing.TARGET)]
            yield paint(vocabulary.decode(inputs.tolist()), BLUE)
            yield paint(vocabulary.decode(targets.tolist()), GREEN)
        for feature, array in arrays.items():
            cells = [paint(f"{value:g}", color) for value, color in zip(array, colors, strict=True)]
            yield f"{feature:13} {' '.join(cells)}"
        yield ""


def painter(is_colored: bool) -> Any:
    """(text, colour) -> text, in that colour on a terminal."""

    def paint(text: str, color: str) -> str:
        return f"\033[{color}m{text}\033[0m" if is_colored else text

    return paint


def _text(value: bytes) -> str:
    return value.decode("utf-8")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(gin_config.rewrite_arguments(argv))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    app.run(main, flags_parser=_parse_flags)
