"""Layouts: how the parameters of one tree are those of another, as data that reads in both directions.

A layout is a list of rules. A rule joins source leaves with target leaves by their names, and their dimensions by named
axes. A Hugging Face Llama as a tree of stacked flax parameters, for example:

    Layout(
        name="llama",
        rules=(
            Rule("model.embed_tokens.weight", "token_embedder/embedding"),
            Rule("model.norm.weight", "decoder/final_norm/scale"),
            Rule("model.layers.{layer}.input_layernorm.weight", "decoder/layers/norm/scale", "embed -> layer embed"),
            Rule("model.layers.{layer}.mlp.up_proj.weight", "decoder/layers/mlp/wi/kernel", "mlp embed -> layer embed mlp"),
            Rule(
                "model.layers.{layer}.self_attn.q_proj.weight",
                "decoder/layers/attention/query/kernel",
                "(heads dim) embed -> layer embed heads dim",
            ),
        ),
        sizes={"heads": 9},
    )

Names. `{layer}` stands for a number (0, 1, ...; no leading zeros), or for one of `values["layer"]`, in that order. A
placeholder that one side lacks is an axis of that side's leaves: they are *stacked* along it. `*` stands for any
characters, the n-th on one side for the n-th on the other. Before `{`, `}`, `*` and the backslash itself, a backslash
takes their meaning away (`escape`).

Axes. Each side lists the dimensions of its leaves; `(heads dim)` is one dimension in which `dim` runs faster. So an arrow
spells transposition, reshape, the splitting of heads, and permutations: rotary embeddings that pair neighbours become
those that pair halves by `(heads pair two) embed -> (heads two pair) embed` with `sizes={"two": 2}`. `...` stands for any
dimensions, the same on both sides. Sizes follow from shapes where only one axis of a dimension is unknown.

Several names on one side are *concatenated* along the axis whose size is a tuple, one number for each:

    Rule(("q.weight", "k.weight", "v.weight"), "qkv.kernel", "(heads dim) embed -> embed heads dim")
    sizes={"heads": (9, 3, 3), "dim": 64}

(Parts of equal size need no tuple: `Rule("{part}.weight", "kv.kernel", "out embed -> embed part out")` with
`values={"part": ("k", "v")}`.)

The first rule that matches a name takes it. What is promised: every leaf is taken, no two become one name, `inverse()`
leads back to the very same names, or else there is an error that names leaf and rule, from headers alone. What it leaves
out: anything that changes a number, drops a leaf or makes one up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from merging.checkpoints.format import LeafSpec
from merging.checkpoints.safetensors_header import refuse, show

SAME = "... -> ..."

MOST_LEAVES = 1_000_000  # from one: no model has so many layers, but a damaged header may

_NUMBER = "0|[1-9][0-9]{0,8}"

Names = str | tuple[str, ...]
Ranges = Mapping[str, tuple[int, int]]  # {axis: (start, stop)}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some leaves of two trees that hold the same numbers; see the module's text.

    Attributes:
      source, target: patterns of names; a tuple of several on at most one side.
      axes: dimensions of the source's leaves -> those of the target's.
    """

    source: Names
    target: Names
    axes: str = SAME

    def inverse(self) -> Rule:
        left, arrow, right = self.axes.partition("->")
        return Rule(self.target, self.source, f"{right.strip()} {arrow} {left.strip()}")

    def __str__(self) -> str:
        return f"{self.source!r} -> {self.target!r}, {self.axes!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Rules that join two parameter trees.

    Attributes:
      name: for messages.
      rules: in order; the first that matches a leaf takes it.
      sizes: {axis: elements, or a tuple of them where several names are concatenated along the axis}.
      values: {placeholder: what it stands for, in the order along its axis}; numbers from 0 where it isn't named.

    Axes named `layer` or `..._layer` run over layers: they become `LeafSpec.stacked`. Raises ValueError for rules that
    contradict themselves.
    """

    name: str
    rules: tuple[Rule, ...]
    sizes: Mapping[str, int | tuple[int, ...]] = dataclasses.field(default_factory=dict)
    values: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self._parsed  # says now what is wrong with the rules

    def inverse(self) -> Layout:
        """The layout that leads back."""
        rules = tuple(rule.inverse() for rule in self.rules)
        return dataclasses.replace(self, name=f"inverse of {self.name}", rules=rules)

    def join(self, specs: Mapping[str, LeafSpec], *, where: str) -> Joined:
        """The leaves of a source tree joined with those of the target tree, in the order of the source.

        `where` names the checkpoint in messages. Raises CheckpointError, with all that does not fit.
        """
        return _Joining(self, specs, where).run()

    @functools.cached_property
    def _parsed(self) -> tuple[_Parsed, ...]:
        return tuple(_Parsed(rule, self) for rule in self.rules)


@dataclasses.dataclass(frozen=True)
class Side:
    """The leaves of one tree that a group joins with the other's.

    Attributes:
      dims: the axes of each dimension of a leaf, slowest first.
      leaves: {name: where it lies along every axis of the group}.
      placed: the axes along which leaves are stacked: each leaf lies at one index.
      at: {indices along `placed`: names}; several where they are concatenated.
    """

    dims: tuple[tuple[str, ...], ...]
    leaves: Mapping[str, Ranges]
    placed: tuple[str, ...]
    at: Mapping[tuple[int, ...], Sequence[str]]

    def overlapping(self, box: Ranges) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """(name, what it has of the box) of each leaf that has any."""
        for index in itertools.product(*(range(*box[axis]) for axis in self.placed)):
            for name in self.at[index]:
                place = self.leaves[name]
                common = {
                    a: (max(place[a][0], r[0]), min(place[a][1], r[1])) for a, r in box.items()
                }
                if all(start < stop for start, stop in common.values()):
                    yield name, common

    def shape(self, name: str) -> tuple[int, ...]:
        place = self.leaves[name]
        return tuple(math.prod(place[a][1] - place[a][0] for a in axes) for axes in self.dims)


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves that hold the same numbers in two ways."""

    source: Side
    target: Side


@dataclasses.dataclass(frozen=True)
class Joined:
    """Two trees, joined.

    Attributes:
      specs: the target's leaves.
      groups: the group of each of them.
    """

    specs: Mapping[str, LeafSpec]
    groups: Mapping[str, Group]


def escape(name: str) -> str:
    """The pattern that stands for this name alone."""
    return re.sub(r"([{}*\\])", r"\\\1", name)


# ---- rules, parsed -------------------------------------------------------------------------------------------------


class _Pattern:
    """A name with placeholders."""

    _TOKEN = re.compile(r"\\(.)|\{([A-Za-z_][A-Za-z0-9_]*)\}|(\*)|([^\\{}*]+)|(.)", re.DOTALL)

    def __init__(self, text: str, values: Mapping[str, tuple[str, ...]]):
        self.text = text
        self._parts: list[tuple[bool, str]] = []  # (is it a key of captures?, key or plain text)
        regex = []
        for escaped, placeholder, star, plain, stray in self._TOKEN.findall(text):
            if stray:
                raise ValueError(f"{text!r}: a stray {stray!r}; write \\{stray} for the character")
            if star:
                key = f"*{sum(is_key and part[0] == '*' for is_key, part in self._parts)}"
                regex.append("(.*)")
            elif placeholder:
                key = placeholder
                known = values.get(placeholder)
                choices = _NUMBER if known is None else "|".join(map(re.escape, known))
                regex.append(f"({choices})")
            else:
                self._parts.append((False, escaped + plain))
                regex.append(re.escape(escaped + plain))
                continue
            if (True, key) in self._parts:
                raise ValueError(f"{text!r}: {{{key}}} stands twice")
            self._parts.append((True, key))
        self.keys = [part for is_key, part in self._parts if is_key]
        self.placeholders = [key for key in self.keys if not key.startswith("*")]
        self._regex = re.compile("".join(regex), re.DOTALL)

    @property
    def plain(self) -> str | None:
        """The one name that it matches, if there is but one."""
        return None if self.keys else "".join(part for _, part in self._parts)

    def match(self, name: str) -> dict[str, str] | None:
        found = self._regex.fullmatch(name)
        return None if found is None else dict(zip(self.keys, found.groups(), strict=True))

    def fill(self, captures: Mapping[str, str]) -> str:
        return "".join(captures[part] if is_key else part for is_key, part in self._parts)


class _Parsed:
    """A rule, taken apart and found consistent."""

    def __init__(self, rule: Rule, layout: Layout):
        self.rule, self.layout = rule, layout
        try:
            self.sources = self._patterns(rule.source)
            self.targets = self._patterns(rule.target)
            left, arrow, right = rule.axes.partition("->")
            if not arrow:
                raise ValueError(
                    "axes need an arrow: dimensions of the source -> those of the target"
                )
            self.source_dims, self.target_dims = _dims(left), _dims(right)
            self._check()
        except ValueError as error:
            raise ValueError(f"layout {layout.name}, rule {rule}: {error}") from None

    def _patterns(self, names: Names) -> list[_Pattern]:
        patterns = [
            _Pattern(name, self.layout.values)
            for name in ((names,) if isinstance(names, str) else names)
        ]
        if not patterns or any(set(p.keys) != set(patterns[0].keys) for p in patterns):
            raise ValueError(f"{names} should all have the same placeholders")
        return patterns

    def _check(self) -> None:
        ours, theirs = set(self.sources[0].keys), set(self.targets[0].keys)
        self.stacked = sorted(ours - theirs)  # axes over source leaves
        self.unstacked = sorted(theirs - ours)  # axes over target leaves
        if any(key.startswith("*") for key in self.stacked + self.unstacked):
            raise ValueError("both sides need the same number of *")
        left = [axis for axes in self.source_dims for axis in axes]
        right = [axis for axes in self.target_dims for axis in axes]
        for axes in (left, right):
            twice = [axis for axis, count in collections.Counter(axes).items() if count > 1]
            if twice:
                raise ValueError(f"{', '.join(twice)} stands twice on one side of the axes")
        found, wanted = set(left) | set(self.stacked), set(right) | set(self.unstacked)
        if found != wanted or set(left) & set(self.stacked) or set(right) & set(self.unstacked):
            raise ValueError(
                f"the source has the axes {sorted(found)} (of leaves and names), the target {sorted(wanted)}; each axis must"
                " be in both, once, and a placeholder is an axis of the side whose names lack it"
            )
        both = set(self.sources[0].placeholders) & theirs & set(left)
        if both:
            raise ValueError(f"{sorted(both)} is an axis, so one side's names must lack it")
        self.joined_axis = self._joined_axis(left)

    def _joined_axis(self, axes: Sequence[str]) -> str | None:
        """The axis along which several names are concatenated."""
        tuples = [a for a in axes if isinstance(self.layout.sizes.get(a), tuple)]
        parts = max(len(self.sources), len(self.targets))
        if min(len(self.sources), len(self.targets)) > 1:
            raise ValueError("several names can stand on one side only")
        if parts == 1 and not tuples:
            return None
        if len(tuples) != 1 or len(self.layout.sizes[tuples[0]]) != parts:
            raise ValueError(
                f"{parts} names are concatenated along one axis whose size is a tuple of as many numbers; found"
                f" {({a: self.layout.sizes[a] for a in tuples}) or 'no such axis'}"
            )
        return tuples[0]


def _dims(text: str) -> tuple[tuple[str, ...], ...]:
    """`(heads dim) embed` -> (("heads", "dim"), ("embed",))."""
    tokens = re.findall(r"\(([^()]*)\)|([A-Za-z_][A-Za-z0-9_]*|\.\.\.)|(\S)", text)
    dims = []
    for grouped, single, stray in tokens:
        if stray:
            raise ValueError(f"can't read the axes {text.strip()!r} at {stray!r}")
        axes = (single,) if single else tuple(grouped.split())
        if not axes or (grouped and not all(map(str.isidentifier, axes))):
            raise ValueError(f"can't read the axes {text.strip()!r} at '({grouped})'")
        dims.append(axes)
    return tuple(dims)


# ---- leaves, joined ------------------------------------------------------------------------------------------------


class _Matcher:
    """Finds the rule that takes a name, on one side of the rules."""

    def __init__(self, sides: Sequence[Sequence[_Pattern]]):
        self._plain: dict[str, tuple[int, int]] = {}  # name -> (rule, part)
        self._others: list[tuple[int, int, _Pattern]] = []
        for number, patterns in enumerate(sides):
            for part, pattern in enumerate(patterns):
                if pattern.plain is None:
                    self._others.append((number, part, pattern))
                else:
                    self._plain.setdefault(pattern.plain, (number, part))

    def find(self, name: str) -> tuple[int, int, dict[str, str]] | None:
        """(rule, part of its tuple of names, captures), or None."""
        plain = self._plain.get(name)
        for number, part, pattern in self._others:
            if plain is not None and plain[0] < number:
                break
            captures = pattern.match(name)
            if captures is not None:
                return number, part, captures
        return None if plain is None else (*plain, {})


class _Misfit(Exception):
    """What is wrong with one group of leaves."""


class _Joining:
    def __init__(self, layout: Layout, specs: Mapping[str, LeafSpec], where: str):
        self.layout, self.specs, self.where = layout, specs, where
        self.rules = layout._parsed
        self.problems: list[str] = []

    def run(self) -> Joined:
        back = _Matcher([rule.targets for rule in self.rules])
        specs: dict[str, LeafSpec] = {}
        groups: dict[str, Group] = {}
        came_from: dict[str, str] = {}
        for (number, captures), members in self._grouped().items():
            rule = self.rules[number]
            first = next(iter(members.values()))
            try:
                group = self._group(rule, dict(captures), members)
            except _Misfit as error:
                self.problems.append(f"{error} (rule {rule.rule})")
                continue
            for name in group.target.leaves:
                if name in specs:
                    self.problems.append(
                        f"leaves {show(came_from[name])} and {show(first)} both become {show(name)} (rule {rule.rule})"
                    )
                    continue
                returned = back.find(name)
                if returned is None or returned[0] != number or not _agree(returned[2], captures):
                    self.problems.append(
                        f"leaf {show(first)} becomes {show(name)}, which would not come back by its rule {rule.rule}"
                    )
                came_from[name] = first
                groups[name] = group
                specs[name] = LeafSpec(
                    name=name,
                    shape=group.target.shape(name),
                    dtype=self.specs[first].dtype,
                    stacked=self._stacked(group, self.specs[first]),
                )
        refuse(
            self.where,
            self.problems,
            f"the layout {self.layout.name} does not fit this checkpoint: choose another, or mend its rules",
        )
        return Joined(specs, groups)

    def _grouped(self) -> dict[tuple[int, tuple], dict[tuple[int, tuple[int, ...]], str]]:
        """{(rule, captures that both sides have): {(part, indices along the stacked axes): name}}."""
        matcher = _Matcher([rule.sources for rule in self.rules])
        groups: dict[tuple[int, tuple], dict[tuple[int, tuple[int, ...]], str]] = {}
        for name in self.specs:
            found = matcher.find(name)
            if found is None:
                self.problems.append(f"{self._told(name)}: no rule takes it")
                continue
            number, part, captures = found
            stacked = self.rules[number].stacked
            index = tuple(self._index_of(axis, captures.pop(axis)) for axis in stacked)
            groups.setdefault((number, tuple(sorted(captures.items()))), {})[part, index] = name
        return groups

    def _index_of(self, axis: str, text: str) -> int:
        known = self.layout.values.get(axis)
        return int(text) if known is None else known.index(text)

    def _text_of(self, axis: str, index: int) -> str:
        known = self.layout.values.get(axis)
        return str(index) if known is None else known[index]

    def _group(
        self,
        rule: _Parsed,
        captures: Mapping[str, str],
        members: Mapping[tuple[int, tuple[int, ...]], str],
    ) -> Group:
        self._check_alike(members)
        sizes = self._given_sizes(rule) | self._counts(rule, captures, members)
        first = next(iter(members.values()))
        rank = len(self.specs[first].shape)
        source_dims, target_dims = _expanded(rule, rank, first)
        parts = _parts(self.layout.sizes[rule.joined_axis]) if rule.joined_axis else None
        for (part, _), name in members.items():
            if parts is not None:
                start, stop = parts[part] if len(rule.sources) > 1 else (0, parts[-1][1])
                sizes[rule.joined_axis] = stop - start
            self._solve(source_dims, sizes, self.specs[name])
        if parts is not None:
            sizes[rule.joined_axis] = parts[-1][1]
        if math.prod(sizes[axis] for axis in rule.unstacked) > MOST_LEAVES:
            raise _Misfit(f"{self._told(first)} would become more than {MOST_LEAVES:,} leaves")

        full = {axis: (0, size) for axis, size in sizes.items()}
        theirs = {
            (part, index): pattern.fill({**captures, **self._texts(rule.unstacked, index)})
            for index in _indices([sizes[axis] for axis in rule.unstacked])
            for part, pattern in enumerate(rule.targets)
        }
        place = functools.partial(_side, full=full, joined_axis=rule.joined_axis, parts=parts)
        return Group(
            place(source_dims, rule.stacked, dict(sorted(members.items())), len(rule.sources) > 1),
            place(target_dims, rule.unstacked, theirs, len(rule.targets) > 1),
        )

    def _given_sizes(self, rule: _Parsed) -> dict[str, int]:
        given = {a: n for a, n in self.layout.sizes.items() if isinstance(n, int)}
        given |= {axis: len(texts) for axis, texts in self.layout.values.items()}
        axes = {axis for axes in rule.source_dims for axis in axes}
        return {axis: size for axis, size in given.items() if axis in axes}

    def _counts(
        self,
        rule: _Parsed,
        captures: Mapping[str, str],
        members: Mapping[tuple[int, tuple[int, ...]], str],
    ) -> dict[str, int]:
        """Sizes of the axes over source leaves, by counting; every leaf of the stack must be there."""
        counts = {}
        for position, axis in enumerate(rule.stacked):
            known = self.layout.values.get(axis)
            found = 1 + max(index[position] for _, index in members)
            counts[axis] = found if known is None else len(known)
            given = self.layout.sizes.get(axis, counts[axis])
            if given != counts[axis]:
                name = next(iter(members.values()))
                raise _Misfit(f"{self._told(name)}: {counts[axis]} along {axis}, wanted {given}")
        for index in _indices(list(counts.values())):
            for part, pattern in enumerate(rule.sources):
                if (part, index) not in members:
                    name = pattern.fill({**captures, **self._texts(rule.stacked, index)})
                    other = next(iter(members.values()))
                    raise _Misfit(f"leaf {show(name)} is missing; {show(other)} belongs to it")
        return counts

    def _texts(self, axes: Sequence[str], index: tuple[int, ...]) -> dict[str, str]:
        """What stands for the placeholders at this index."""
        return {a: self._text_of(a, i) for a, i in zip(axes, index, strict=True)}

    def _told(self, name: str) -> str:
        return f"leaf {show(name)} {list(self.specs[name].shape)}"

    def _check_alike(self, members: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
        """Leaves of one stack must have one shape, and all leaves of a group one dtype."""
        by_part: dict[int, LeafSpec] = {}
        first = self.specs[next(iter(members.values()))]
        for (part, _), name in members.items():
            spec = self.specs[name]
            alike = by_part.setdefault(part, spec)
            if (spec.shape, spec.dtype) != (alike.shape, first.dtype):
                other = alike if spec.shape != alike.shape else first
                raise _Misfit(
                    f"leaf {show(name)} is {spec.dtype}{list(spec.shape)}, but {show(other.name)}, with which it is put into"
                    f" one, is {other.dtype}{list(other.shape)}"
                )

    def _solve(
        self, dims: tuple[tuple[str, ...], ...], sizes: dict[str, int], spec: LeafSpec
    ) -> None:
        """Adds the sizes of a leaf's axes that follow from its shape."""
        for number, (axes, size) in enumerate(zip(dims, spec.shape, strict=True)):
            unknown = [axis for axis in axes if axis not in sizes]
            known = math.prod(sizes[axis] for axis in axes if axis in sizes)
            told = f"{self._told(spec.name)}: dimension {number}, ({' '.join(axes)}),"
            if len(unknown) > 1:
                raise _Misfit(
                    f"{told} has axes of unknown size: give {' or '.join(unknown)} in sizes"
                )
            if not unknown:
                if known != size:
                    given = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes)
                    raise _Misfit(f"{told} has {size} elements, wanted {known} ({given})")
            elif known == 0 or size % known:
                given = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes if axis in sizes)
                raise _Misfit(f"{told} has {size} elements, which {given} doesn't divide")
            else:
                sizes[unknown[0]] = size // known

    @staticmethod
    def _stacked(group: Group, source: LeafSpec) -> int | None:
        """The target's dimension over layers."""
        axes = {a for dims in group.source.dims for a in dims} | set(group.source.placed)
        layers = {axis for axis in axes if axis == "layer" or axis.endswith("_layer")}
        if source.stacked is not None and len(group.source.dims[source.stacked]) == 1:
            layers.add(group.source.dims[source.stacked][0])
        found = [i for i, dim in enumerate(group.target.dims) if len(dim) == 1 and dim[0] in layers]
        return found[0] if len(found) == 1 else None


def _agree(returned: Mapping[str, str], captures: tuple[tuple[str, str], ...]) -> bool:
    return all(returned.get(key) == text for key, text in captures)


def _indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices, one by one: a hostile name can make a size huge."""
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in _indices(sizes[1:]):
            yield first, *rest


def _parts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where each of several concatenated leaves lies along their axis."""
    ends = list(itertools.accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _side(
    dims: tuple[tuple[str, ...], ...],
    placed: Sequence[str],
    names: Mapping[tuple[int, tuple[int, ...]], str],
    is_parted: bool,
    *,
    full: Ranges,
    joined_axis: str | None,
    parts: Sequence[tuple[int, int]] | None,
) -> Side:
    """One tree's leaves, `names` by (part, index along the placed axes)."""
    leaves: dict[str, Ranges] = {}
    at: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)
    for (part, index), name in names.items():
        place = full | {axis: (i, i + 1) for axis, i in zip(placed, index, strict=True)}
        if is_parted:
            place[joined_axis] = parts[part]
        leaves[name] = place
        at[index].append(name)
    return Side(dims, leaves, tuple(placed), dict(at))


def _expanded(
    rule: _Parsed, rank: int, name: str
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """The dimensions of both sides, `...` replaced by as many axes as a source leaf's rank wants."""
    rest = ("...",)
    named = sum(axes != rest for axes in rule.source_dims)
    if rank < named or (rank > named and rest not in rule.source_dims):
        raise _Misfit(f"leaf {show(name)} has {rank} dimensions, wanted {named}")
    filling = [(f"...{i}",) for i in range(rank - named)]

    def filled(dims: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        return tuple(d for axes in dims for d in (filling if axes == rest else (axes,)))

    return filled(rule.source_dims), filled(rule.target_dims)
