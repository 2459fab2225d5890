r"""Merges a base and its fine-tuned experts in weight space, from disk to disk.

In short:
  python -m launch.merge --base=/data/base --experts=/data/a,/data/b --method=ties --output=/data/merged

The same by gin, where everything can be set (gin_configs/runs/merge.gin lists the macros):
  python -m launch.merge --gin_file=gin_configs/runs/merge.gin --gin_file=gin_configs/methods/ties.gin \
    --gin.BASE='"/data/base"' --gin.EXPERTS='["/data/a", "/data/b"]' --gin.OUTPUT_DIR='"/data/merged"' \
    --gin.Ties.density=0.1

Many merges from one read, each into its own folder below the output:
  python -m launch.merge --base=/data/base --experts=/data/a,/data/b --output=/data/merged \
    --gin.METHODS='{"ties": @Ties(), "sparse": @sparse/Ties(), "sum": @TaskArithmetic()}' \
    --gin.sparse/Ties.density=0.05

What a YAML file of mergekit says, as far as the methods are here (merging/mergekit.py says how):
  python -m launch.merge --mergekit_config=merge.yml --output=/data/merged

The same command again returns at once where the output is done, and goes on where an earlier one was killed or failed.
--dry_run checks the inputs and prints the plan; with --gin_file=gin_configs/meshes/v5e-256.gin what it takes on that TPU, too.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from launch import command, devices, gin_config, merge_price, preemption, progress

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.merge import Report

RUN_FILE = "gin_configs/runs/merge.gin"

flags.adopt_module_key_flags(gin_config)
flags.adopt_module_key_flags(devices)


def define_flags() -> None:
    """Not at import, since other commands have flags of these names."""
    flags.DEFINE_string("base", None, "Folder of the base's checkpoint; short for --gin.BASE.")
    flags.DEFINE_list(
        "experts",
        None,
        "Folders of the experts' checkpoints, with commas between; short for --gin.EXPERTS.",
    )
    flags.DEFINE_string(
        "method",
        None,
        "A file of gin_configs/methods without .gin: averaging, task_arithmetic, ties, dare, dare_ties.",
    )
    flags.DEFINE_string("output", None, "Folder to be made; short for --gin.OUTPUT_DIR.")
    flags.DEFINE_string(
        "mergekit_config",
        None,
        "A YAML file of mergekit, in place of --base, --experts and --method.",
    )


def main(joined: devices.Processes) -> None:
    """Merges as the flags say."""
    values = flags.FLAGS
    files, bindings = shorthand(
        base=values.base,
        experts=values.experts,
        method=values.method,
        output=values.output,
        files=gin_config.GIN_FILE.value,
    )
    if values.mergekit_config is not None:
        if (values.base, values.experts, values.method) != (None, None, None):
            raise ValueError(
                "--mergekit_config names base, experts and method: leave out --base, --experts and --method"
            )
        found, notes = mergekit_bindings(values.mergekit_config)
        bindings += found
        if joined.index == 0:
            print("".join(f"# {values.mergekit_config}: {note}\n" for note in notes), end="")
    bindings += gin_config.GIN_BINDINGS.value
    resolved = configured(files, bindings, search_paths=gin_config.GIN_SEARCH_PATHS.value)
    merge(resolved, joined, is_dry_run=gin_config.DRY_RUN.value)


def shorthand(
    *,
    base: str | None,
    experts: Sequence[str] | None,
    method: str | None,
    output: str | None,
    files: Sequence[str],
) -> tuple[list[str], list[str]]:
    """The gin files and bindings that the short flags stand for, around the files that were given."""
    return gin_config.shorthand(
        {"BASE": base, "EXPERTS": experts, "OUTPUT_DIR": output},
        files,
        run_file=RUN_FILE,
        more=[] if method is None else [f"gin_configs/methods/{method}.gin"],
    )


def mergekit_bindings(path: str) -> tuple[list[str], Sequence[str]]:
    """What a YAML file of mergekit says as gin bindings, and what is to be told of it."""
    from merging import mergekit

    translated = mergekit.translate(path)
    settings = dict(translated.settings)
    method = settings.pop("method")
    kind = type(method).__name__
    bindings = [f"{name.upper()} = {value!r}" for name, value in settings.items()]
    bindings.append(f"METHOD = @{kind}()")
    for field in dataclasses.fields(method):
        bindings.append(f"{kind}.{field.name} = {getattr(method, field.name)!r}")
    return bindings, translated.notes


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> gin_config.Resolved:
    """What gin files and bindings say about a merge."""
    from merging.engine.plan import Settings
    from merging.partitioning import MeshShape

    gin_config.register(Settings, name="merge")
    gin_config.register(merge_price.On, name="price")
    gin_config.register_values(MeshShape)
    gin_config.register_methods()
    gin_config.parse(files, bindings, search_paths=search_paths, either={"METHOD": "METHODS"})
    return gin_config.resolve(Settings, name="merge")


def priced_on() -> merge_price.On:
    """What the configuration says of a TPU to price the merge for."""
    return merge_price.On(**gin_config.resolve(merge_price.On, name="price").arguments)


def merge(
    resolved: gin_config.Resolved, joined: devices.Processes, *, is_dry_run: bool = False
) -> Report | None:
    """Prints configuration and plan, merges, and prints the report, which it returns; None after a dry run."""
    from merging import merge as stage

    is_shown = joined.index == 0
    should_stop = preemption.should_stop_soon(joined)
    on = priced_on() if is_dry_run else merge_price.On()
    planned = stage.plan(stage.Settings(**resolved.arguments), is_elsewhere=on.mesh is not None)
    if is_shown:
        print(f"{resolved.text}\n{planned.describe()}\n", flush=True)
    if is_dry_run:
        if is_shown and on.mesh is not None:
            print(merge_price.described(merge_price.price(planned, on), on), flush=True)
        planned.close()
        return None
    gc.freeze()  # what imports made stays: a collection that walks it takes as long as ten pieces
    with (
        progress.Progress(is_shown=is_shown) as shown,
        preemption.ending(shown.log, joined),
    ):
        report = stage.run(
            planned,
            config_text=resolved.text,
            progress=shown,
            log=shown.log,
            should_stop=should_stop,
        )
    if is_shown:
        print(report.describe(), flush=True)
    return report


if __name__ == "__main__":
    define_flags()
    command.run(main)
