"""What a merge method is: a frozen dataclass of hyper-parameters with a pure `__call__` on one leaf.

A method knows nothing of files, meshes, hosts, gin or the model: it gets the base's and the experts' arrays of one leaf
(or of any slice of it) and returns the merged one in float32. To add one, put a file in this folder with a subclass of
`Method`; there is no list to update.

Two kinds. *elementwise*: any slice of a leaf may be merged alone. *whole*: needs the tensor as a matrix; the engine
hands it whole tensors, one layer at a time where `scan` stacked them.

Facts about the whole model reach a method only through `survey`, which the engine fills by counting, and keep masks
only through `draw`. What a method asks of the survey stands in `trim_density`, `trim_scope`, `asks_majority` and
`asks_l1`.

Subclasses become frozen keyword-only dataclasses by themselves, and JAX pytrees whose leaves are the numbers, so that
ten settings of one method share one compiled step. Text fields are structure, and tell programs apart.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    dataclass_transform,
    runtime_checkable,
)

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from merging.kernels.arithmetic import Number, float32, unfused

Weights = Sequence[Number] | None  # arrays inside a jitted step, where numbers are leaves
Density = Number | Sequence[Number]  # one for all experts, or one for each
ZeroSign = Literal["majority", "positive", "none"]
Scope = Literal["model", "tensor"]
Rescale = Literal["inverse_keep", "l1", "none"]
Combine = Literal["mean", "sum"]


class Survey(NamedTuple):
    """Facts of the whole model that a method asked for; the fields it did not ask for are empty.

    Attributes:
      thresholds: per expert float32 [] (or broadcastable to the leaf: one a layer). Entries of at least this magnitude
        survive the trim; +inf where none does.
      majority: float32 [], the sign that a vote of zero elects by `zero_sign="majority"`: +1 or -1.
      l1: per expert float32 [], L1 norm of the task vector over that of what the drop left of it, of one tensor.
    """

    thresholds: tuple[Array, ...] = ()
    majority: Array | None = None
    l1: tuple[Array, ...] = ()


@runtime_checkable
class Draw(Protocol):
    """Gives keep masks. `draw(expert, keep)`: bool of the slice's shape, True with probability `keep`."""

    def __call__(self, expert: int, keep: Float[Array, ""]) -> Bool[Array, "*shape"]: ...


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Method:
    """One merge method. See the module's docstring; a subclass overrides `__call__` or, better, is a `TaskVectorMethod`."""

    kind: ClassVar[Literal["elementwise", "whole"]] = "elementwise"

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        fields = dataclasses.fields(cls)  # annotations are text here (PEP 563)
        words = ("ZeroSign", "Scope", "Rescale", "Combine", "str")
        structure = [f.name for f in fields if f.type in words]
        jax.tree_util.register_dataclass(
            cls,
            data_fields=[f.name for f in fields if f.name not in structure],
            meta_fields=structure,
        )

    def __post_init__(self) -> None:
        """Checks belong into a subclass's own, which calls this first: lists, as gin has them, become tuples."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    def __call__(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        """The merged leaf, float32.

        Args:
          base: the base's leaf or a slice of it, any float dtype.
          experts: the same of each expert; a tuple, not a stacked axis, which XLA:CPU sums 70 times slower.
          survey: what the method asked for.
          draw: gives keep masks.
        """
        raise NotImplementedError

    # ---- what the engine asks of a method -----------------------------------------------------------------------

    @property
    def trim_fraction(self) -> Density | None:
        """The fraction of entries that the magnitude trim keeps, or None where nothing is trimmed."""
        return None

    @property
    def trim_scope(self) -> Scope:
        """Over what the trim ranks magnitudes: the whole flattened model or each tensor."""
        return "model"

    @property
    def asks_majority(self) -> bool:
        """True if the method needs the majority of the elected signs of the whole model."""
        return False

    @property
    def asks_l1(self) -> bool:
        """True if the method needs L1 norms of each tensor before and after the drop."""
        return False

    @property
    def draws_masks(self) -> bool:
        """True if the result depends on the seed."""
        return False

    @property
    def asks_survey(self) -> bool:
        """True if the method needs any fact of the whole model, hence a read before the merge."""
        return self.trim_fraction is not None or self.asks_majority or self.asks_l1

    def check(self, experts: int) -> None:
        """Raises ValueError if the method can't merge so many experts."""
        if experts < 1:
            raise ValueError(
                f"{type(self).__name__} merges experts, and there are none: name at least one"
            )
        for name in ("weights", "density"):
            numbers = getattr(self, name, None)
            if isinstance(numbers, Sequence) and len(numbers) != experts:
                raise ValueError(
                    f"{type(self).__name__}.{name} has {len(numbers)} numbers for {experts} experts: give one per expert"
                )


class TaskVectorMethod(Method):
    """A method of the form base + scale * direction, where the direction comes from the task vectors.

    The scale is thereby free: merges that differ in it alone share the direction.
    """

    def direction(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        """What `scale` multiplies, float32."""
        raise NotImplementedError

    def vectors(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> list[Float[Array, "*shape"]]:
        """The task vectors as the trim ranks them: plain here, after the drop in DARE."""
        del survey, draw
        return task_vectors(base, experts)

    def __call__(
        self,
        base: Float[Array, "*shape"],
        experts: Sequence[Float[Array, "*shape"]],
        *,
        survey: Survey,
        draw: Draw,
    ) -> Float[Array, "*shape"]:
        direction = self.direction(base, experts, survey=survey, draw=draw)
        return apply_direction(base, direction, self.scale)


def task_vectors(
    base: Float[Array, "*shape"], experts: Sequence[Float[Array, "*shape"]]
) -> list[Float[Array, "*shape"]]:
    """tau_i = theta_i - theta_0, float32."""
    base = float32(base)
    return [float32(expert) - base for expert in experts]


def apply_direction(
    base: Float[Array, "*shape"], direction: Float[Array, "*shape"], scale: Number
) -> Float[Array, "*shape"]:
    """theta_0 + scale * direction, the product rounded on its own, float32."""
    return float32(base) + unfused(jnp.asarray(scale, jnp.float32) * direction)


def each_density(density: Density, experts: int) -> tuple[Number, ...]:
    """The density of each expert."""
    return tuple(density) if isinstance(density, Sequence) else (density,) * experts


# ---- checks that the dataclasses share; arrays (a traced method) pass unseen -------------------------------------


def check_fraction(method: str, field: str, value: Density | None) -> None:
    """Raises ValueError unless 0 < value <= 1, each where there are several."""
    for each in value if isinstance(value, Sequence) else (value,):
        if isinstance(each, numbers.Real) and not 0 < each <= 1:
            raise ValueError(
                f"{method}.{field} is {value}: it is the fraction kept, more than 0 and at most 1"
                " (0.2 keeps the largest 20 %)"
            )


def check_scale(method: str, value: Number) -> None:
    """Raises ValueError unless the value is finite."""
    if isinstance(value, numbers.Real) and not math.isfinite(value):
        raise ValueError(f"{method}.scale is {value}: give a finite number")


def check_weights(
    method: str, weights: Weights, *, is_vote: bool = False, is_mean: bool = False
) -> None:
    """Raises ValueError unless all weights are finite (and none negative in a vote, and their float32 sum not 0 in a mean)."""
    if weights is None or not all(isinstance(w, numbers.Real) for w in weights):
        return
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"{method}.weights are {tuple(weights)}: give finite numbers")
    if is_vote and any(w < 0 for w in weights):
        raise ValueError(
            f"{method}.weights are {tuple(weights)}: a vote has no negative weights; 0 leaves an expert out"
        )
    if is_mean and sum(map(np.float32, weights)) == 0:
        raise ValueError(
            f"{method}.weights are {tuple(weights)}: their sum is 0, so they have no mean"
        )


def check_choice(method: str, field: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"{method}.{field} is {value!r}: choose one of {', '.join(map(repr, choices))}"
        )
