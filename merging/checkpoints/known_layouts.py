"""Layouts by name, and the one between two checkpoints that differ in no more than stacking and spelling.

Three spellings of one tree: `decoder/layers_7/mlp/kernel`, `decoder.layers.7.mlp.kernel`, and entry 7 of the stacked
`decoder/layers/mlp/kernel`. No user has to say which a checkpoint has: shapes and names do.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from merging.checkpoints.format import LeafSpec, Reader
from merging.checkpoints.layout_reader import BUFFER_BYTES, LayoutReader
from merging.checkpoints.layouts import Layout, Rule, escape
from merging.checkpoints.safetensors_header import refuse, show
from merging.paths import canonical

# What frameworks call the part of a name that a layer's number follows: Llama, Gemma and T5X; BERT; T5 and GPT-J; MPT;
# GPT-2.
LAYER_PARTS = ("layers", "layer", "block", "blocks", "h")

_NUMBER = re.compile(r"(?:(?<=[^0-9_./])_|(?<=[^./])[./])(0|[1-9][0-9]{0,8})(?=[./]|$)")


def stacked(
    specs: Mapping[str, LeafSpec],
    *,
    axis: int = 0,
    under: str | Sequence[str] = LAYER_PARTS,
) -> Layout:
    """The layout that stacks the layers of these leaves along an axis: `layers_7/mlp/wi` is entry 7 of `layers/mlp/wi`.

    `under`: parts of names that layers' numbers follow. A leaf that not all layers have, or not in one shape, stays
    as it is. Raises CheckpointError where nothing is to be stacked, or a leaf has too few dimensions for the axis.
    """
    places: dict[_Place, dict[int, LeafSpec]] = {}
    for name, spec in specs.items():
        place, number = next(
            (found for found in _numbered(name) if found[0].is_under(under)), (None, 0)
        )
        if place is not None:
            places.setdefault(place, {})[number] = spec
    counts: dict[str, int] = {}
    for place, layers in places.items():
        counts[place.root] = max(counts.get(place.root, 0), 1 + max(layers))
    rules, problems = [], []
    for place, layers in places.items():
        kinds = {(spec.shape, spec.dtype) for spec in layers.values()}
        if len(layers) < counts[place.root] or len(kinds) > 1:
            continue
        shape = next(iter(layers.values())).shape
        if len(shape) < axis:
            problems.append(f"leaf {show(place.name(0))} {list(shape)} can't be stacked so")
        rules.append(_stacking(place.stacked, place, axis).inverse())
    if not rules:
        problems.append(f"no leaf has a number under {' or '.join(_tuple(under))}")
    refuse(
        f"layout stacked(axis={axis})", problems, "choose another LAYOUT, axis=... or under='...'"
    )
    return Layout(name=f"stacked(axis={axis})", rules=(*rules, Rule("*", "*")))


def unstacked(
    specs: Mapping[str, LeafSpec],
    *,
    axis: int | None = None,
    under: str | Sequence[str] = LAYER_PARTS,
    separator: str | None = None,
) -> Layout:
    """The layout that makes each entry of a stacked leaf a leaf: the inverse of `stacked`.

    Args:
      axis: over layers; None where the checkpoint says it itself (`LeafSpec.stacked`).
      under: parts of names behind which layers' numbers go.
      separator: before the number: `_`, `.` or `/`; None: `.` in names that have dots and no slash, else `_`.

    Raises CheckpointError where nothing is stacked, the axis isn't known, or numbers of layers differ.
    """
    if separator not in (None, "_", ".", "/"):
        raise ValueError(f"separator is {separator!r}: choose one of _ . /")
    rules, problems, counts = [], [], {}
    for name, spec in specs.items():
        root = _unnumbered_root(name, under)
        along = spec.stacked if axis is None else axis
        if root is None:
            if spec.stacked is not None:
                problems.append(f"leaf {show(name)} is stacked; name a part of it with under='...'")
            continue
        if along is None or along >= len(spec.shape):
            problems.append(
                f"leaf {show(name)} {list(spec.shape)}: its axis over layers is {along}"
            )
            continue
        default = "." if "." in name and "/" not in name else "_"
        place = _Place(root, default if separator is None else separator, name[len(root) :])
        count = counts.setdefault(root, spec.shape[along])
        if count != spec.shape[along]:
            problems.append(
                f"leaf {show(name)} {list(spec.shape)}: {spec.shape[along]} layers along axis {along}, others have {count}"
            )
        rules.append(_stacking(name, place, along))
    if not rules and not problems:
        problems.append(f"no leaf is stacked under {' or '.join(_tuple(under))}")
    refuse("layout unstacked", problems, "give LAYOUT as 'unstacked(axis=0)', or choose another")
    return Layout(name="unstacked", rules=(*rules, Rule("*", "*")))


# A layout for the leaves of a checkpoint; options by keyword.
Maker = Callable[..., Layout]
LAYOUTS: dict[str, Maker] = {"stacked": stacked, "unstacked": unstacked}
# Those that take more than leaves, the model's sizes: `models.trees`.
TREES = ("own", "huggingface")


def named_layout(text: str, specs: Mapping[str, LeafSpec]) -> Layout:
    """The layout of a LAYOUT macro, such as `stacked` or `stacked(axis=1)`, for these leaves.

    Raises ValueError for a name or an option that isn't known.
    """
    name, options = parsed(text)
    if name not in LAYOUTS:
        raise ValueError(f"LAYOUT {text!r}: known are {', '.join((*LAYOUTS, *TREES))}")
    try:
        return LAYOUTS[name](specs, **options)
    except TypeError as error:
        raise ValueError(f"LAYOUT {text!r}: {error}") from error


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """`stacked(axis=1)` -> ("stacked", {"axis": 1}). Raises ValueError for what is not spelled so."""
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"LAYOUT {text!r}: write a name, or one with options: 'stacked(axis=1)'")


def find_layout(
    wanted: Mapping[str, LeafSpec], found: Mapping[str, LeafSpec], *, where: str = "checkpoint"
) -> Layout | None:
    """The layout from the leaves `found` to those `wanted`, as far as stacking and spelling make them differ.

    What differs in more (a leaf that only one has, another shape) passes as it is, under the name that is wanted of it: whether that
    is wrong is for others to say. None: no leaf would change.

    Raises CheckpointError where the axis over layers can't be told from shapes (all candidates have as many entries).
    """
    ours, theirs = _by_path(wanted), _by_path(found)
    if ours is None or theirs is None:
        return None
    rules = []
    for path in sorted(ours.keys() & theirs.keys()):
        if ours[path].shape == theirs[path].shape:
            rules.append(Rule(escape(theirs.pop(path).name), escape(ours.pop(path).name)))
    stacks = _stacks(ours, theirs, where)  # those wanted stacked
    rules += [_stacking(name, place, axis).inverse() for name, place, axis in stacks]
    stacks = _stacks(theirs, ours, where)  # those found stacked
    rules += [_stacking(name, place, axis) for name, place, axis in stacks]
    rules += [
        Rule(escape(spec.name), escape(ours.get(path, spec).name)) for path, spec in theirs.items()
    ]
    if all(rule.source == rule.target for rule in rules):
        return None
    return Layout(name="as the base has it", rules=tuple(rules))


def in_layout_of(
    wanted: Mapping[str, LeafSpec], reader: Reader, *, buffer_bytes: int = BUFFER_BYTES
) -> Reader:
    """The reader, in the layout of the leaves `wanted` where that can be found; else as it is."""
    found = reader.specs()
    if found.keys() == wanted.keys():
        return reader
    layout = find_layout(wanted, found, where=reader.location)
    return reader if layout is None else LayoutReader(reader, layout, buffer_bytes=buffer_bytes)


def layer_of(name: str) -> tuple[str, int] | None:
    """`model.layers.7.mlp.weight` -> ("model/layers/7", 7): a layer's path and number; None where the leaf is in no layer."""
    for place, number in _numbered(name):
        if place.is_under(LAYER_PARTS):
            return f"{canonical(place.root)}/{number}", number
    return None


# ---- where names have numbers --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """A name with a place for a layer's number: root + separator + number + rest."""

    root: str
    separator: str
    rest: str

    @property
    def stacked(self) -> str:
        """The name of the leaf that holds all layers."""
        return self.root + self.rest

    @property
    def pattern(self) -> str:
        return f"{escape(self.root + self.separator)}{{layer}}{escape(self.rest)}"

    def name(self, number: int) -> str:
        return f"{self.root}{self.separator}{number}{self.rest}"

    def is_under(self, parts: str | Sequence[str]) -> bool:
        return re.split("[./]", self.root)[-1] in _tuple(parts)


def _numbered(name: str) -> Iterator[tuple[_Place, int]]:
    """Every place of a name that has a number, and the number."""
    for match in _NUMBER.finditer(name):
        start, stop = match.span(1)
        yield _Place(name[: match.start()], name[match.start() : start], name[stop:]), int(match[1])


def _unnumbered_root(name: str, under: str | Sequence[str]) -> str | None:
    """The name up to the first part in `under`, if no number follows that."""
    for match in re.finditer(r"[^./]+", name):
        numbered = re.match(r"[./](0|[1-9][0-9]*)(?=[./]|$)", name[match.end() :])
        if match[0] in _tuple(under):
            return None if numbered else name[: match.end()]
    return None


def _stacking(name: str, place: _Place, axis: int) -> Rule:
    """The rule from a stacked leaf to its layers."""
    before = "".join(f"d{i} " for i in range(axis))
    return Rule(escape(name), place.pattern, f"{before}layer ... -> {before}...")


def _tuple(parts: str | Sequence[str]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else tuple(parts)


# ---- finding -------------------------------------------------------------------------------------------------------


def _by_path(specs: Mapping[str, LeafSpec]) -> dict[str, LeafSpec] | None:
    """Leaves by canonical path; None where two share one."""
    by_path = {canonical(name): spec for name, spec in specs.items()}
    return by_path if len(by_path) == len(specs) else None


def _stacks(
    whole: dict[str, LeafSpec], single: dict[str, LeafSpec], where: str
) -> list[tuple[str, _Place, int]]:
    """(stacked leaf, place of its layers' names, axis) of each leaf of `whole` whose layers are in `single`.

    Takes what it finds out of both.
    """
    layers: dict[str, dict[_Place, dict[int, LeafSpec]]] = {}
    for spec in single.values():
        for place, number in _numbered(spec.name):
            layers.setdefault(canonical(place.stacked), {}).setdefault(place, {})[number] = spec
    fitting: dict[str, tuple[_Place, set[int]]] = {}
    for path, spec in whole.items():
        choices = {
            place: axes
            for place, entries in layers.get(path, {}).items()
            if (axes := _axes(spec, entries))
        }
        if len(choices) == 1:
            fitting[path] = next(iter(choices.items()))
    shared: dict[str, set[int]] = {}  # axes that all leaves under a root can have
    for place, axes in fitting.values():
        shared[place.root] = shared.get(place.root, axes) & axes
    result, problems = [], []
    for path, (place, axes) in fitting.items():
        axes = axes if len(axes) == 1 else shared[place.root]
        spec = whole.pop(path)
        for number in range(len(layers[path][place])):
            del single[canonical(place.name(number))]
        if len(axes) == 1:
            result.append((spec.name, place, *axes))
        else:
            problems.append(
                f"leaf {show(spec.name)} {list(spec.shape)}: more than one axis, or none that its neighbours share, can be that"
                f" over the layers of {show(place.name(0))}"
            )
    refuse(where, problems, "say it with STACKED, {pattern: axis}")
    return result


def _axes(spec: LeafSpec, layers: Mapping[int, LeafSpec]) -> set[int]:
    """The axes of a leaf along which these layers can lie."""
    shapes = {layer.shape for layer in layers.values()}
    if len(shapes) > 1 or max(layers) >= len(layers):
        return set()
    shape = shapes.pop()
    axes = range(len(spec.shape)) if spec.stacked is None else (spec.stacked,)
    return {
        axis
        for axis in axes
        if spec.shape[axis] == len(layers) and spec.shape[:axis] + spec.shape[axis + 1 :] == shape
    }
