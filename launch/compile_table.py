"""Reports of models that `launch.compile` saved, as one Markdown table: a part of `launch.compile`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

GB = 1e9
STEPS = ("train", "score", "prefill", "decode")


def markdown(files: Sequence[str]) -> str:
    """A row for each report: what each program asks of a chip's memory, its least seconds, and tokens/s of the whole mesh.

    Raises ValueError where a file is no report of a model.
    """
    lines = [["parameters", "slice", "chip", *STEPS, "merge"]]
    lines += [["---"] * len(lines[0]), *map(_row, files)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(file: str) -> list[str]:
    try:
        report = json.loads(pathlib.Path(file).read_text())
        programs, mesh = report["programs"], report["mesh"]
        slices = "" if report["slices"] == 1 else f"{report['slices']} x "
        return [
            f"{report['parameters'] / 1e9:.3g} B",
            f"{slices}{report['topology']}, {' x '.join(map(str, mesh.values()))}",
            f"{report['chip']['memory_bytes'] / GB:.3g} GB",
            *(_step(programs.get(name)) for name in STEPS),
            _merge({n: found for n, found in programs.items() if n not in STEPS}),
        ]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--table: {file} is no report of a model ({type(error).__name__}: {error}): give files that --json saved"
            " with --model and --mesh"
        ) from error


def _step(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    told = _memory(found)
    if not found["fits"]:
        return told
    return f"{told}; {found['roofline']['seconds']:.3g} s, {found['tokens_per_s']:,.0f}/s"


def _merge(programs: Mapping[str, Mapping[str, Any]]) -> str:
    """The most memory that a program of any method asks for, and each method's time, its survey's passes included."""
    if not programs:
        return "-"
    refused = [found for found in programs.values() if not found["fits"]]
    if refused:
        return _memory(refused[0])
    seconds: dict[str, float] = {}
    for name, found in programs.items():
        method = name.split(" ")[1]
        seconds[method] = seconds.get(method, 0.0) + found["roofline"]["seconds"]
    most = max(programs.values(), key=lambda found: found["memory_bytes"])
    return f"{_memory(most)}; " + ", ".join(f"{method} {s:.2g} s" for method, s in seconds.items())


def _memory(found: Mapping[str, Any]) -> str:
    if "reason" in found:
        return f"**no**: {found['reason']}"
    if not found["fits"]:
        return f"**no**: {found['memory_bytes'] / GB:.3g} GB"
    return f"{found['argument_bytes'] / GB:.3g} + {found['temporary_bytes'] / GB:.2g} GB"
