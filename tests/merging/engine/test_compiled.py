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
from merging.engine.collectives import Collective
from merging.engine.compiled import Program, figures
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
HloModule scanned, replica_count=2, num_partitions=2

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %all-gather-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}
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


# As TPU's compiler writes them: a gather of a weight of 4 parts of 2 rows, beside a product; its start and its end are
# fusions too. And an all-reduce of which each device keeps its part.
BESIDE = """\
HloModule beside, is_scheduled=true, num_partitions=8

%begin (p.0: bf16[2,16]) -> (bf16[2,16], bf16[8,16], u32[]) {
  %p.0 = bf16[2,16]{1,0} parameter(0)
  %gather.0 = bf16[8,16]{1,0} all-gather(%p.0), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %started = (bf16[2,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[2,16], p.2: bf16[8,16], p.3: u32[], p.4: f32[4,8]) -> (f32[4,8], bf16[2,16], bf16[8,16], bf16[8,16], u32[]) {
  %p.1 = bf16[2,16]{1,0} parameter(0)
  %p.2 = bf16[8,16]{1,0} parameter(1)
  %p.3 = u32[]{:S(2)} parameter(2)
  %p.4 = f32[4,8]{1,0} parameter(3)
  %tanh.1 = f32[4,8]{1,0} tanh(%p.4)
  %gather.1 = bf16[8,16]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %t.1 = (f32[4,8]{1,0}, bf16[2,16]{1,0}, bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) tuple(%tanh.1, %p.1, %p.2, %gather.1, %p.3)
}

%end (p.5: bf16[2,16], p.6: bf16[8,16], p.7: u32[]) -> bf16[8,16] {
  %p.5 = bf16[2,16]{1,0} parameter(0)
  %gather.2 = bf16[8,16]{1,0} all-gather(%p.5), channel_id=5, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %p.6 = bf16[8,16]{1,0} parameter(1)
  %p.7 = u32[]{:S(2)} parameter(2)
  ROOT %ended = bf16[8,16]{1,0} custom-call(%p.5, %p.6, %gather.2, %p.7), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (p.8: f32[4,8]) -> f32[1,8] {
  %p.8 = f32[4,8]{1,0} parameter(0)
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%p.8), channel_id=6, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %me = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %mine = f32[1,8]{1,0} dynamic-slice(%all-reduce.1, %me, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (shard: bf16[2,16], x: f32[4,8]) -> (bf16[8,16], f32[1,8], f32[4,8]) {
  %shard = bf16[2,16]{1,0} parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  %start = (bf16[2,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) fusion(%shard), kind=kCustom, calls=%begin
  %s.0 = bf16[2,16]{1,0} get-tuple-element(%start), index=0
  %s.1 = bf16[8,16]{1,0} get-tuple-element(%start), index=1
  %s.2 = u32[]{:S(2)} get-tuple-element(%start), index=2
  %middle = (f32[4,8]{1,0}, bf16[2,16]{1,0}, bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) fusion(%s.0, %s.1, %s.2, %x), kind=kOutput, calls=%beside
  %m.0 = f32[4,8]{1,0} get-tuple-element(%middle), index=0
  %m.1 = bf16[2,16]{1,0} get-tuple-element(%middle), index=1
  %m.2 = bf16[8,16]{1,0} get-tuple-element(%middle), index=2
  %m.4 = u32[]{:S(2)} get-tuple-element(%middle), index=4
  %done = bf16[8,16]{1,0} fusion(%m.1, %m.2, %m.4), kind=kCustom, calls=%end
  %scattered = f32[1,8]{1,0} fusion(%m.0), kind=kCustom, calls=%all-reduce-scatter
  %max = f32[4,8]{1,0} all-reduce(%m.0), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%sum
  ROOT %all = (bf16[8,16]{1,0}, f32[1,8]{1,0}, f32[4,8]{1,0}) tuple(%done, %scattered, %max)
}
"""


def test_a_collective_beside_fusions_is_one_and_one_that_keeps_a_slice_scatters():
    program = Program(BESIDE)
    weight, sums = 8 * 16 * 2, 4 * 8 * 4
    assert program.collectives == {
        "all-gather": one(weight, sent=weight * 3 // 4, dtype="bf16"),
        "all-reduce": one(
            sums, sent=sums, dtype="f32"
        ),  # two devices: each sends half of it, twice
        "reduce-scatter": one(sums, sent=sums * 3 // 4, dtype="f32"),
    }


def test_a_collective_beside_fusions_moves_its_bytes_once():
    part, weight, sums = 2 * 16 * 2, 8 * 16 * 2, 4 * 8 * 4
    gathered, through_tanh, scattered, reduced = part + weight, 2 * sums, sums + sums // 4, 2 * sums
    handed_on = part  # among what the start gives
    assert (
        Program(BESIDE).bytes_touched == gathered + handed_on + through_tanh + scattered + reduced
    )


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
        "all-reduce": one(40, sent=2 * 40 * 7 // 8, largest=20, dtype="u32")
    }
    assert program.argument_bytes == 400
    assert program.output_bytes == 20


def test_a_loop_counts_as_often_as_it_runs_and_an_asynchronous_collective_once():
    program = Program(LOOP)
    assert program.loops == 1
    assert program.operations == 10 * (1 + 8 + 1)
    assert program.collectives == {
        "all-gather": one(10 * 32 * 4, sent=10 * 24 * 4, largest=128, count=10, dtype="f32")
    }
    assert program.output_bytes == 4 + 32


def one(nbytes: int, *, sent: int, dtype: str, largest: int | None = None, count: int = 1):
    return Collective(
        count=count,
        nbytes=nbytes,
        sent_bytes=sent,
        largest_bytes=nbytes if largest is None else largest,
        dtypes=(dtype,),
    )


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
    assert found.collectives == {"all-reduce": one(4, sent=7, dtype="f32")}
    assert 2 * 256 <= found.operations <= 2 * 256 + 32
    assert found.traffic >= 1
    assert found.memory_bytes >= found.argument_bytes + found.output_bytes
    assert found.to_json()["traffic"] == found.traffic
    assert found.to_json()["compile_seconds"] == 2.0


def test_the_largest_results_are_those_in_main_memory():
    assert Program(REDUCTIONS).largest_results == [("reduce u32[5]", 20)]
    assert Program(LOOP).largest_results == [
        ("all-gather-done f32[32]", 128),
        ("slice f32[8]", 32),
        ("tanh f32[8]", 32),
        ("add s32[]", 4),
        ("compare pred[]", 1),
    ]


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
