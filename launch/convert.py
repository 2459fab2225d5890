r"""Writes a checkpoint in another format, layout or float type, from disk to disk.

In short, to another format:
  python -m launch.convert --input=/data/model --format=safetensors --output=/data/copy

To another layout, with all layers of a parameter in one array, and back:
  python -m launch.convert --input=/data/model --layout=stacked --output=/data/stacked
  python -m launch.convert --input=/data/stacked --layout='unstacked(axis=0)' --output=/data/model_again

A llama or gemma 3 that was trained here, as a folder that transformers opens, and such a folder in our own tree:
  python -m launch.convert --input=/data/expert --layout=huggingface --output=/data/exported
  python -m launch.convert --input=/data/exported --layout=own --format=orbax --output=/data/ours

The same by gin, where everything can be set (gin_configs/runs/convert.gin lists the macros):
  python -m launch.convert --gin_file=gin_configs/runs/convert.gin --gin.INPUT='"/data/model"' \
    --gin.OUTPUT_DTYPE='"bfloat16"' --gin.OUTPUT_DIR='"/data/model_bfloat16"'

The same command again returns at once where the output is done, and goes on where an earlier one was killed or failed.
--dry_run checks the input and prints the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from launch import command, devices, gin_config, progress

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.convert import Report

RUN_FILE = "gin_configs/runs/convert.gin"

flags.adopt_module_key_flags(gin_config)
flags.adopt_module_key_flags(devices)


def define_flags() -> None:
    """Not at import, since other commands have flags of these names."""
    flags.DEFINE_string("input", None, "Folder of the checkpoint; short for --gin.INPUT.")
    flags.DEFINE_string(
        "format",
        None,
        "safetensors, orbax, t5x or t5x_orbax; the input's if not given; short for --gin.FORMAT.",
    )
    flags.DEFINE_string(
        "layout",
        None,
        "Such as 'stacked(axis=1)', 'huggingface' or 'own'; the input's if not given; short for --gin.LAYOUT.",
    )
    flags.DEFINE_string("output", None, "Folder to be made; short for --gin.OUTPUT_DIR.")


def main(joined: devices.Processes) -> None:
    """Converts as the flags say."""
    values = flags.FLAGS
    if joined.count > 1:
        raise ValueError(f"convert runs in one process, not {joined.count}: start it once")
    files, bindings = gin_config.shorthand(
        {
            "INPUT": values.input,
            "FORMAT": values.format,
            "LAYOUT": values.layout,
            "OUTPUT_DIR": values.output,
        },
        gin_config.GIN_FILE.value,
        run_file=RUN_FILE,
    )
    bindings += gin_config.GIN_BINDINGS.value
    resolved = configured(files, bindings, search_paths=gin_config.GIN_SEARCH_PATHS.value)
    convert(resolved, is_dry_run=gin_config.DRY_RUN.value)


def configured(
    files: Sequence[str], bindings: Sequence[str], *, search_paths: Sequence[str] = (".",)
) -> gin_config.Resolved:
    """What gin files and bindings say about a conversion."""
    from merging.convert import Settings

    gin_config.register(Settings, name="convert")
    gin_config.parse(files, bindings, search_paths=search_paths)
    return gin_config.resolve(Settings, name="convert")


def convert(resolved: gin_config.Resolved, *, is_dry_run: bool = False) -> Report | None:
    """Prints configuration and plan, converts, and prints the report, which it returns; None after a dry run."""
    from merging import convert as stage

    planned = stage.plan(stage.Settings(**resolved.arguments))
    print(f"{resolved.text}\n{planned.describe()}\n", flush=True)
    if is_dry_run:
        planned.close()
        return None
    with progress.Progress() as shown:
        report = stage.run(planned, config_text=resolved.text, progress=shown, log=shown.log)
    print(report.describe(), flush=True)
    return report


if __name__ == "__main__":
    define_flags()
    command.run(main)
