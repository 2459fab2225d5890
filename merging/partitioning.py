"""Meshes, and the rules that cut every array of a model over one: the only place that maps logical axes to mesh axes.

A mesh has three axes, outermost first:

  data    copies of the model, each with its own rows of the batch; over several slices this axis alone crosses the data centre's network
  fsdp    rows of the batch too, and every parameter is cut over it and gathered layer by layer (arXiv 1910.02054, stage 3)
  model   heads, hidden units and vocabulary, whose partial results are added up

Where several experts are trained by one step, a fourth axis, `expert`, lies outside of these and has some of them on each of its
parts, which have nothing to tell one another.

Models name the axes of their parameters and activations (`flax.linen.with_logical_partitioning`); `RULES` says over which
mesh axes each name is cut. An axis that its rule does not cut evenly is an error that names parameter, axis and mesh:
nothing is padded, and nothing falls back to being whole.

Shardings come from shapes alone (`AbstractMesh`), for devices that are here, or for a described topology.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from merging.paths import of_tree_path

MESH_AXES = ("data", "fsdp", "model")
EXPERT_AXIS = "expert"

# In order of precedence: a mesh axis cuts each array once. So `embed` cuts parameters over fsdp, and not activations,
# whose batch has taken it.
RULES: tuple[tuple[str, tuple[str, ...] | str | None], ...] = (
    ("experts", EXPERT_AXIS),
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("embed", "fsdp"),
    ("kv_heads", None),  # one in PaLM, few elsewhere: every device of the model axis has them all
    ("kv", None),
    ("length", None),
    ("layers", None),
)
CACHE_AXES = ("layers", "batch", "length", "kv_heads", "kv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices lie along each axis of a mesh, and which slices of which TPU they are meant for.

    Attributes:
      data, fsdp, model: devices along each axis, within one slice.
      experts: parts of the mesh that have experts of their own, where several are trained by one step; else 1.
      slices: slices that are joined by the data centre's network; the data axis has slices * data devices.
      topology: of one slice, as TPU compilers name it, `v5p:4x4x4`; None for whatever devices there are.
      hosts: machines of one slice; None where it is not known.
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1
    experts: int = 1
    slices: int = 1
    topology: str | None = None
    hosts: int | None = None

    def __post_init__(self) -> None:
        for name in (*MESH_AXES, "experts", "slices"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"MeshShape.{name} is {getattr(self, name)}: it must be at least 1"
                )
        if self.experts > 1 and self.slices > 1:
            raise ValueError(
                "MeshShape.experts is for one slice: train other experts on other slices"
            )
        if self.topology is not None and self.chips != math.prod(self._within):
            raise ValueError(
                f"a mesh of {self._told} does not use the {self.chips} chips"
                f" of {self.topology}: their product must be that"
            )

    @classmethod
    def of_all_devices(cls) -> MeshShape:
        """The default of every stage: all devices that there are along the data axis."""
        return cls(data=jax.device_count())

    @property
    def chips(self) -> int:
        """Devices of one slice."""
        if self.topology is None:
            return math.prod(self._within)
        return math.prod(int(size) for size in self.topology.partition(":")[2].split("x"))

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.slices * math.prod(self._within)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the mesh's axes, outermost first."""
        return MESH_AXES if self.experts == 1 else (EXPERT_AXIS, *MESH_AXES)

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Devices along each of `axes`, over all slices."""
        within = (self.slices * self.data, self.fsdp, self.model)
        return within if self.experts == 1 else (self.experts, *within)

    @property
    def _within(self) -> tuple[int, int, int, int]:
        """Devices along experts, data, fsdp and model within one slice."""
        return (self.experts, self.data, self.fsdp, self.model)

    @property
    def _told(self) -> str:
        sizes = f"data={self.data} x fsdp={self.fsdp} x model={self.model}"
        return sizes if self.experts == 1 else f"experts={self.experts} x {sizes}"

    def abstract(self) -> AbstractMesh:
        """The mesh without devices, which is enough for shardings."""
        return AbstractMesh(self.axis_sizes, self.axes)

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of some devices, default all that there are; neighbours in a TPU's torus are neighbours in the mesh."""
        devices = jax.devices() if devices is None else devices
        if len(devices) != self.size:
            raise ValueError(
                f"a mesh of {describe(self.abstract())} is for {self.size} devices, and there are {len(devices)}:"
                " choose data, fsdp, model and slices so that their product is that"
            )
        if devices[0].platform != "tpu":
            return Mesh(np.array(devices).reshape(self.axis_sizes), self.axes)
        within = self.axis_sizes if self.slices == 1 else (self.data, self.fsdp, self.model)
        if self.slices == 1:
            laid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        else:
            laid = mesh_utils.create_hybrid_device_mesh(
                within, (self.slices, 1, 1), devices, allow_split_physical_axes=True
            )
        return Mesh(laid, self.axes)


def mesh_of(mesh: MeshShape | Mesh | None) -> Mesh:
    """A mesh of devices from what a stage may be given; None: all devices along the data axis."""
    mesh = mesh or MeshShape.of_all_devices()
    return mesh.mesh() if isinstance(mesh, MeshShape) else mesh


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Within it, models constrain their activations by `RULES` on this mesh: trace and call jitted functions here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


# ---- shardings ----------------------------------------------------------------------------------------------------


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a tree whose arrays may be boxed with the names of their axes: parameters, or a whole train state.

    Args:
      tree: of arrays or ShapeDtypeStructs, in flax's `LogicallyPartitioned` boxes or not. Optimizers that map over boxed
        parameters box their own state alike.
      mesh: with any of the axes data, fsdp, model.

    Returns:
      The tree without boxes, a NamedSharding in place of each array. What has no box is whole on every device.

    Raises ValueError that names every parameter and axis that its rule does not cut evenly.
    """
    boxed, structure = jax.tree.flatten_with_path(tree, is_leaf=is_box)
    found, uneven = [], []
    for path, leaf in boxed:
        names, shape = (leaf.names, leaf.value.shape) if is_box(leaf) else ((), leaf.shape)
        spec = _spec(names, mesh)
        uneven += _uneven(of_tree_path(path), names, shape, spec, mesh)
        found.append(NamedSharding(mesh, spec))
    if uneven:
        raise ValueError("\n  ".join([f"a mesh of {describe(mesh)} does not cut evenly:", *uneven]))
    return jax.tree.unflatten(structure, found)


def batch_shardings(batch: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a tree of [B, ...] arrays: rows are cut over data and fsdp."""
    return shardings(jax.tree.map(lambda x: _boxed(x, ("batch",)), batch), mesh)


def rows_sharding(
    shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, has_experts: bool
) -> NamedSharding:
    """The sharding of a [B, ...] array of rows, or of an [E, B, ...] array of each expert's rows.

    Raises ValueError where the mesh does not cut the rows, or the experts, evenly.
    """
    names = ("experts", "batch") if has_experts else ("batch",)
    spec = _spec(names, mesh)
    uneven = _uneven("a batch", names, shape, spec, mesh)
    if uneven:
        raise ValueError(
            "\n  ".join([f"a mesh of {describe(mesh)} does not cut evenly:", *uneven])
            + "\nchoose another BATCH_SIZE, or fewer parts along those axes of the mesh"
        )
    return NamedSharding(mesh, spec)


def of_experts(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of arrays with a leading axis over experts, from those of one expert's."""
    (first,) = _spec(("experts",), mesh)
    return jax.tree.map(lambda one: NamedSharding(mesh, PartitionSpec(first, *one.spec)), tree)


def cache_shardings(cache: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a key/value cache, [L, B, S, K, h] entries and [B] lengths: rows are cut as a batch's."""

    def boxed(leaf: Any) -> Any:
        return _boxed(leaf, CACHE_AXES if len(leaf.shape) == len(CACHE_AXES) else ("batch",))

    return shardings(jax.tree.map(boxed, cache), mesh)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def describe(mesh: Mesh | AbstractMesh) -> str:
    """`data=1, fsdp=16, model=4`."""
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def _spec(names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The rules' answer for the axes of one array, without mesh axes that this mesh lacks."""
    unknown = [name for name in names if name is not None and name not in _NAMES]
    if unknown:
        raise ValueError(
            f"an array's axes are named {tuple(names)}, and there is no rule for {', '.join(unknown)}:"
            f" known are {', '.join(_NAMES)}"
        )
    spec = nn.logical_to_mesh_axes(names, RULES)
    assert spec is not None
    return PartitionSpec(*(_present(axes, mesh.shape) for axes in spec))


def _present(axes: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(axes, tuple):
        kept = tuple(axis for axis in axes if axis in sizes)
        return kept if len(kept) > 1 else (kept[0] if kept else None)
    return axes if axes in sizes else None


def _uneven(
    path: str,
    names: Sequence[str | None],
    shape: tuple[int, ...],
    spec: PartitionSpec,
    mesh: Mesh | AbstractMesh,
) -> list[str]:
    told = []
    for axis, cut in enumerate(spec):
        over = (cut,) if isinstance(cut, str) else cut or ()
        parts = math.prod(mesh.shape[name] for name in over)
        if shape[axis] % parts:
            told.append(
                f"{path} {list(shape)}: axis {axis} ({names[axis]}, {shape[axis]}) by {' x '.join(over)} = {parts}"
            )
    return told


def _boxed(leaf: Any, names: tuple[str | None, ...]) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(leaf, names=names)


def is_box(leaf: Any) -> bool:
    """Whether an array of a tree comes in a box with the names of its axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


_NAMES = tuple(dict(RULES))
