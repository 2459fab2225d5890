"""Figures read from HLO: by hand on small texts, and on programs compiled here."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from merging.checkpoints.format import LeafSpec
from merging.engine import resident, step
from merging.engine.compiled import Collective, Program, figures
from merging.engine.programs import COUNTS, merge_programs, whole_leaf
from merging.engine.programs import Program as Compilable
from merging.methods import METHODS
from merging.methods.dare import Dare
from merging.methods.ties import Ties
from merging.paths import Stacked

FUSIONS = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[6,4]{1,0:T(8,128)(2,1)})->bf16[6,4]{1,0}}

FileNames
1 "step.py"

%fused_computation (param_0: bf16[6,4], param_1: f32[]) -> bf16[6,4] {
  %param_0 = bf16[6,4]{1,0:T(8,128)(2,1)} parameter(0)
  %convert.1 = f32[6,4]{1,0:T(8,128)} convert(%param_0), metadata={op_name="jit(step)/convert" stack_frame_id=1}
  %param_1 = f32[]{:T(128)} parameter(1)
  %broadcast.1 = f32[6,4]{1,0:T(8,128)} broadcast(%param_1), dimensions={}
  %multiply.1 = f32[6,4]{1,0:T(8,128)} multiply(%convert.1, %broadcast.1)
  ROOT %convert.2 = bf16[6,4]{1,0:T(8,128)(2,1)} convert(%multiply.1)
}

ENTRY %main (param.1: bf16[6,4], param.2: f32[]) -> bf16[6,4] {
  %param.1 = bf16[6,4]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}
  %param.2 = f32[]{:T(128)} parameter(1)
  ROOT %fusion = bf16[6,4]{1,0:T(8,128)(2,1)} fusion(%param.1, %param.2), kind=kLoop, calls=%fused_computation
}
"""

REDUCTIONS = """\
HloModule counts

%add_two (a: u32[], b: u32[], c: u32[], d: u32[]) -> (u32[], u32[]) {
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  %c = u32[] parameter(2)
  %d = u32[] parameter(3)
  %add.1 = u32[] add(%a, %c)
  %add.2 = u32[] add(%b, %d)
  ROOT %tuple.1 = (u32[], u32[]) tuple(%add.1, %add.2)
}

%sum (x: u32[], y: u32[]) -> u32[] {
  %x = u32[] parameter(0)
  %y = u32[] parameter(1)
  ROOT %add.3 = u32[] add(%x, %y)
}

ENTRY %main (p: u32[5,10], q: u32[5,10]) -> u32[5] {
  %p = u32[5,10]{1,0} parameter(0)
  %q = u32[5,10]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %reduce = (u32[5]{0}, /*index=1*/u32[5]{0}) reduce(%p, %q, %zero, %zero), dimensions={1}, to_apply=%add_two
  %first = u32[5]{0} get-tuple-element(%reduce), index=0
  %second = u32[5]{0} get-tuple-element(%reduce), index=1
  %all-reduce.1 = (u32[5]{0:T(128)S(1)}, u32[5]{0:T(128)S(1)}) all-reduce(%first, %second), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%sum
  ROOT %result = u32[5]{0} get-tuple-element(%all-reduce.1), index=0
}
"""

LOOP = """\
HloModule scanned

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %all-gather-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %all-gather-done = f32[32]{0} all-gather-done(%all-gather-start)
  %part = f32[8]{0} slice(%all-gather-done), slice={[0:8]}
  %tanh.1 = f32[8]{0} tanh(%part)
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%next, %tanh.1)
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (x0: f32[8]) -> (s32[], f32[8]) {
  %x0 = f32[8]{0} parameter(0)
  %start = s32[] constant(0)
  %begun = (s32[], f32[8]{0}) tuple(%start, %x0)
  ROOT %while = (s32[], f32[8]{0}) while(%begun), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"},"flag_configs":[]}
}
"""


def test_what_is_in_fusions_counts_and_moves_do_not():
    program = Program(FUSIONS)
    assert program.argument_bytes == 6 * 4 * 2 + 4
    assert program.output_bytes == 6 * 4 * 2
    assert program.operations == 3 * 24
    assert program.collectives == {}
    assert program.loops == 0


def test_a_reduction_counts_what_it_applies_to_each_element():
    program = Program(REDUCTIONS)
    assert program.operations == 2 * 50
    assert program.collectives == {
        "all-reduce": Collective(count=1, nbytes=40, largest_bytes=20, dtypes=("u32",))
    }
    assert program.argument_bytes == 400
    assert program.output_bytes == 20


def test_a_loop_counts_as_often_as_it_runs_and_an_asynchronous_collective_once():
    program = Program(LOOP)
    assert program.loops == 1
    assert program.operations == 10 * (1 + 8 + 1)
    assert program.collectives == {
        "all-gather": Collective(count=10, nbytes=10 * 32 * 4, largest_bytes=128, dtypes=("f32",))
    }
    assert program.output_bytes == 4 + 32


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("pred[3]", 3),
        ("s4[3]", 2),
        ("f8e4m3fn[5]", 5),
        ("u64[]", 8),
        ("token[]", 0),
        ("c64[2]", 16),
    ],
)
def test_bytes_of_dtypes(value: str, nbytes: int):
    text = f"ENTRY %main () -> {value} {{\n  ROOT %r = {value}{{}} custom-call()\n}}\n"
    assert Program(text).output_bytes == nbytes


def test_a_text_that_is_no_hlo_is_refused():
    with pytest.raises(AssertionError, match="no ENTRY"):
        Program("module @jit_f {}")


def test_figures_of_a_program_compiled_here():
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)
    found = figures(jax.jit(lambda x: (x + 1, jnp.sum(x))).lower(x).compile(), compile_seconds=2.0)
    assert found.argument_bytes == 8 * 32 * 4
    assert found.output_bytes == 8 * 32 * 4 + 4
    assert found.collectives == {
        "all-reduce": Collective(count=1, nbytes=4, largest_bytes=4, dtypes=("f32",))
    }
    assert 2 * 256 <= found.operations <= 2 * 256 + 32
    assert found.traffic >= 1
    assert found.memory_bytes >= found.argument_bytes + found.output_bytes
    assert found.to_json()["traffic"] == found.traffic
    assert found.to_json()["compile_seconds"] == 2.0


# ---- the engine's programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stacked"), [((6, 8, 16), 0), ((8, 6, 16), 1), ((6, 8, 16), None), ((16,), None)]
)
def test_geometry_is_that_of_the_resident_merge(shape: tuple[int, ...], stacked: int | None):
    spec = LeafSpec(name="layers/w", shape=shape, dtype=np.dtype(np.float32), stacked=stacked)
    patterns = Stacked(None if stacked is None else {"layers": stacked})
    leaf = resident._Leaf(spec, patterns, seed=0, experts=2)
    assert whole_leaf(shape, stacked) == leaf.geometry


def test_programs_are_those_that_a_merge_runs_and_send_only_counts():
    """Compiled for 8 CPU devices here; for TPUs see tests/launch/test_compile.py."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    programs = list(
        merge_programs(
            [METHODS["averaging"](), Ties(), Dare()],
            shape=(3, 8, 16),
            dtype=np.dtype(ml_dtypes.bfloat16),
            experts=2,
            sharding=NamedSharding(mesh, PartitionSpec(None, "x", "y")),
            stacked=0,
        )
    )
    assert [program.name for program in programs] == [
        "merge averaging, stacked",
        "merge ties, stacked",
        "survey ties, stacked",
        "votes ties, stacked",
        "merge dare, stacked",
    ]
    for program in programs:
        found = program.compile()
        assert program.elements == 3 * 2 * 8
        sent = {dtype for each in found.collectives.values() for dtype in each.dtypes}
        assert sent <= COUNTS
        assert bool(sent) == (not program.name.startswith("merge"))


def test_shortfalls_are_told():
    x = jax.ShapeDtypeStruct(
        (64, 32),
        jnp.float32,
        sharding=NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x")),
    )
    program = Compilable(
        name="sum", lower=lambda: jax.jit(jnp.sum).lower(x), elements=1, most_traffic=0.5
    )
    traffic, sent = program.shortfalls(program.compile())
    assert "sum touches" in traffic and "wanted at most 0.5" in traffic
    assert sent == "sum: all-reduce moves f32, wanted no collective"


@pytest.mark.parametrize("stacked", [None, 0, 1, 2])
@pytest.mark.parametrize("countable", [2**32, 100, 10, 2])
def test_counts_in_parts_are_the_same(
    stacked: int | None, countable: int, monkeypatch: pytest.MonkeyPatch
):
    """Few enough elements at once for 32 bits, the rest summed in 64."""
    monkeypatch.setattr(step, "_COUNTABLE", countable)
    shape = (3, 5, 7)
    geometry = whole_leaf(shape, stacked)
    flags = np.random.default_rng(0).random((2, *shape)) < 0.4
    over = tuple(axis for axis in range(3) if axis != stacked)
    with jax.enable_x64(True):
        counts = jax.jit(functools.partial(step._count_all, geometry=geometry))(list(flags))
    for count, flag in zip(counts, flags, strict=True):
        assert count.dtype == np.uint64
        np.testing.assert_array_equal(count, flag.sum(axis=over))


def test_as_many_axes_as_32_bits_can_count_are_reduced_together():
    geometry = whole_leaf((66, 8192, 32768), None)
    flag = jax.ShapeDtypeStruct(geometry.shape, jnp.bool_)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(lambda f: step._count_all([f], geometry))(flag)
    (reduction,) = [e for e in program.eqns if e.primitive.name.startswith("reduce")][:1]
    axes = reduction.params.get("dimensions", reduction.params.get("axes"))
    assert sorted(axes) == [1, 2]
    assert math.prod(geometry.shape[axis] for axis in axes) < 2**32
    assert reduction.outvars[0].aval.dtype == np.uint32
