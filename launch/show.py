r"""Shows what is in a checkpoint, how it was made, and how two checkpoints differ.

  python -m launch.show /data/merged
  python -m launch.show /data/merged --norms --leaves='*mlp*'
  python -m launch.show /data/base /data/merged
  python -m launch.show /data/merged --verify
  python -m launch.show /data/state --params_path=params

Leaves with shape, dtype and bytes, from headers alone; with --norms L2 norms, largest magnitudes and how many elements
are NaN or infinite, which reads everything once. Two checkpoints are compared leaf by leaf, second minus first, and
leaves that are equal in every element are only counted. --verify reads what this program wrote again and compares it
with the checksums of the manifest, piece by piece, with what lies beside the parameters; the exit code is 1 where any differs.
Of a train state (Orbax, T5X) the parameters are shown: where they are the manifest says, or --params_path.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

if TYPE_CHECKING:  # the library brings jax, which --help does without
    from merging.checkpoints.format import LeafSpec, Reader
    from merging.checkpoints.inspect import Difference

NORMS = flags.DEFINE_bool("norms", False, "Norms and numbers of non-finite elements of each leaf.")
VERIFY = flags.DEFINE_bool("verify", False, "Read everything again and compare checksums.")
LEAVES = flags.DEFINE_string(
    "leaves",
    "*",
    "Only leaves whose name, as stored or with / for each dot, is like this: '*mlp*'.",
)
PARAMS_PATH = flags.DEFINE_list(
    "params_path",
    None,
    "Where the parameters are in the tree of a train state, keys joined by /; empty: the whole tree is shown. Of two"
    " checkpoints one for both, or two with a comma between.",
)
STACKED = flags.DEFINE_list(
    "stacked", [], "Where `scan` stacked layers: PATTERN=AXIS, as in 'decoder/layers/*=1'."
)


def main(argv: Sequence[str]) -> None:
    """Shows one checkpoint, or two and their difference."""
    if len(argv) not in (2, 3):
        raise app.UsageError(f"name one checkpoint or two; found {len(argv) - 1}")
    try:
        for line in shown(
            argv[1:],
            leaves=LEAVES.value,
            stacked=STACKED.value,
            params_path=() if PARAMS_PATH.value is None else PARAMS_PATH.value or [""],
            has_norms=NORMS.value,
            is_verified=VERIFY.value,
        ):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            traceback.print_exc()
        sys.exit(f"Error: {error}")


def shown(
    paths: Sequence[str],
    *,
    leaves: str = "*",
    stacked: Sequence[str] = (),
    params_path: Sequence[str] = (),
    has_norms: bool = False,
    is_verified: bool = False,
) -> Iterator[str]:
    """The lines to print, as they become known; arguments as the flags."""
    from merging.checkpoints import inspect, open_checkpoint
    from merging.engine.compatible import with_stacked
    from merging.paths import Stacked

    if has_norms and len(paths) > 1:
        raise ValueError("--norms is of one checkpoint: a difference has norms of its own")
    if is_verified and len(paths) > 1:
        raise ValueError("--verify is of one checkpoint")
    patterns = Stacked(dict(_pattern(item) for item in stacked))
    readers, specs = [], []
    with contextlib.ExitStack() as opened:
        for path, given in zip(paths, _of_each(params_path, len(paths)), strict=True):
            how = _manifest(path)
            where = how.get("params_path") if given is None else given
            reader = open_checkpoint(path, params_path=where)
            readers.append(opened.enter_context(contextlib.closing(reader)))
            every = with_stacked(readers[-1].specs(), patterns)
            specs.append(inspect.matching(every, leaves, where=path))
            yield path
            if len(paths) == 1:
                yield from _leaves(readers[0], specs[0], has_norms=has_norms)
            yield _total(specs[-1])
            yield from _made(how)
            if is_verified:
                yield from _verified(path, readers[-1], how)
        if len(paths) == 2:
            yield from _difference(*readers, *specs)


def _leaves(reader: Reader, specs: Mapping[str, LeafSpec], *, has_norms: bool) -> Iterator[str]:
    from merging.checkpoints import inspect

    if not has_norms:
        yield from map(_leaf, specs.values())
        return
    row = "{:>12} {:>12} {:>10} ".format
    yield row("norm", "largest", "not finite")
    found = []
    for each in inspect.contents(reader, specs):
        found.append(each)
        numbers = row(f"{each.norm:.6g}", f"{each.largest:.6g}", f"{each.not_finite:,}")
        yield numbers + _leaf(specs[each.name])
    total = inspect.total_contents(found)
    yield row(f"{total.norm:.6g}", f"{total.largest:.6g}", f"{total.not_finite:,}") + "  all leaves"


def _of_each(params_path: Sequence[str], number: int) -> list[str | None]:
    """The flag for each of so many checkpoints; None where it isn't given."""
    if len(params_path) > 1 and len(params_path) != number:
        raise ValueError(f"--params_path has {len(params_path)} paths for {number} checkpoints")
    return [*params_path] if len(params_path) == number else [*(params_path or [None])] * number


def _verified(path: str, reader: Reader, how: Mapping[str, Any]) -> Iterator[str]:
    """Raises ValueError after the last line if anything differs."""
    from merging.checkpoints import checksums, open_checkpoint
    from merging.checkpoints.format import CheckpointError

    if "checksums" not in how:
        raise CheckpointError(
            f"{reader.location} has no manifest with checksums: only what this program wrote can be verified"
        )
    if how.get("params_path") is not None:  # its checksums are of the whole tree
        reader = open_checkpoint(path, params_path="")
    nbytes = pieces = wrong = 0
    for read, problem in checksums.verify(reader, how["checksums"]):
        nbytes, pieces, wrong = nbytes + read, pieces + 1, wrong + (problem is not None)
        if problem is not None:
            yield f"DIFFERS  {problem}"
    if wrong:
        raise CheckpointError(
            f"{reader.location}: {wrong} of {pieces} pieces are not what was written: make it again, or fetch it from a"
            " good copy"
        )
    yield f"verified {nbytes:,} bytes in {pieces} pieces: all are what was written"


def _difference(
    first: Reader, second: Reader, one: Mapping[str, LeafSpec], two: Mapping[str, LeafSpec]
) -> Iterator[str]:
    from merging.checkpoints import inspect

    found = inspect.structure(one, two)
    yield from (f"only in the first   {_leaf(spec)}" for spec in found.only_first)
    yield from (f"only in the second  {_leaf(spec)}" for spec in found.only_second)
    for a, b in [*found.reshaped, *found.retyped]:
        yield f"first {a.dtype} {_shape(a)}, second {b.dtype} {_shape(b)}: {a.name}"
    row = "{:>16} {:>8} {:>12} {:>12} {:>10}   {}".format
    yield row("different", "share", "largest", "norm", "not finite", "second - first")
    leaves = []
    for each in inspect.differences(first, second, found.comparable):
        leaves.append(each)
        if each.different:
            yield row(*_numbers(each), each.name)
    yield row(*_numbers(inspect.total_difference(leaves)), "all leaves")
    yield f"{sum(not each.different for each in leaves)} of {len(leaves)} leaves compared are equal"


def _numbers(each: Difference) -> list[str]:
    numbers = [f"{each.different:,}", f"{each.share:.2%}", f"{each.largest:.6g}"]
    return [*numbers, f"{each.norm:.6g}", f"{each.not_finite:,}"]


def _leaf(spec: LeafSpec) -> str:
    return f"{spec.nbytes:>16,}  {spec.dtype.name:8} {_shape(spec):24} {spec.name}"


def _shape(spec: LeafSpec) -> str:
    sizes = [f"{n} layers" if i == spec.stacked else str(n) for i, n in enumerate(spec.shape)]
    return f"[{', '.join(sizes)}]"


def _total(specs: Mapping[str, LeafSpec]) -> str:
    dtypes = collections.Counter(spec.dtype.name for spec in specs.values())
    parameters = sum(spec.size for spec in specs.values() if spec.is_merged)
    others = sum(spec.size for spec in specs.values() if not spec.is_merged)
    nbytes = sum(spec.nbytes for spec in specs.values())
    return (
        f"{nbytes:>16,}  bytes in {len(specs)} leaves"
        f" ({', '.join(f'{count} {dtype}' for dtype, count in dtypes.items())}):"
        f" {parameters:,} parameters" + (f", {others:,} other elements" if others else "")
    )


def _manifest(path: str) -> dict[str, Any]:
    """How a folder of ours was made; {} for any other checkpoint."""
    from merging import manifest

    how = manifest.read(path) or {}
    if "merges" in how:  # a folder of folders
        merges = ", ".join(f"{path}/{name}" for name in how["merges"])
        raise ValueError(f"{path} holds {len(how['merges'])} merges: name one of {merges}")
    return how


def _made(how: Mapping[str, Any]) -> Iterator[str]:
    from merging.checkpoints.format import CheckpointError

    if how:
        code = str(how.get("environment", {}).get("code", "unknown"))
        yield f"made by {how.get('stage')} in {how.get('seconds')} s, {how.get('made')}, code {code[:12]}"
    if "method" in how:
        yield f"method  {how.get('method')}, seed {how.get('identity', {}).get('seed')}"
    for name, given in how.get("inputs", {}).items():
        for each in given if isinstance(given, list) else [given]:
            if not isinstance(each, dict):
                raise CheckpointError(f"the manifest says {each!r} of {name}: it is damaged")
            yield f"{name.removesuffix('s'):7} {each.get('path')} ({str(each.get('digest'))[:12]})"


def _pattern(item: str) -> tuple[str, int]:
    pattern, _, axis = item.rpartition("=")
    if not pattern or not axis.isdigit():
        raise ValueError(f"--stacked={item}: give PATTERN=AXIS, as in 'decoder/layers/*=1'")
    return pattern, int(axis)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    app.run(main)
