"""Turns of loops, products and bytes read from HLO: by hand on small texts, and on programs compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from merging.engine.compiled import Program, figures
from merging.engine.hlo import Module

# A scan over layers as TPU's compiler prints it: no trip count, the counter goes through a copy, a layer is sliced in a fusion,
# and the result is updated in place.
SCAN = """\
HloModule scan

%take (p0: f32[6,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[6,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %layer = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero.1), dynamic_slice_sizes={1,8}
}

%put (q0: f32[6,8], q1: f32[1,8], q2: s32[]) -> f32[6,8] {
  %q0 = f32[6,8]{1,0} parameter(0)
  %q1 = f32[1,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %updated = f32[6,8]{1,0} dynamic-update-slice(%q0, %q1, %q2, %zero.2)
}

%body (state: (s32[], f32[6,8], f32[6,8])) -> (s32[], f32[6,8], f32[6,8]) {
  %state = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %in = f32[6,8]{1,0} get-tuple-element(%state), index=1
  %out = f32[6,8]{1,0} get-tuple-element(%state), index=2
  %step = s32[]{:T(128)} constant(STEP)
  %taken = f32[1,8]{1,0:T(8,128)S(1)} fusion(%in, %i), kind=kLoop, calls=%take
  %next = s32[]{:T(128)S(6)} add(%i, %step)
  %put.1 = f32[6,8]{1,0} fusion(%out, %taken, %i), kind=kLoop, calls=%put
  ROOT %tuple = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}) tuple(%next, %in, %put.1)
}

%condition (state.1: (s32[], f32[6,8], f32[6,8])) -> pred[] {
  %state.1 = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}) parameter(0)
  %end = s32[]{:T(128)} constant(6)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x: f32[6,8], y: f32[6,8]) -> f32[6,8] {
  %x = f32[6,8]{1,0} parameter(0)
  %y = f32[6,8]{1,0} parameter(1)
  %begin = s32[]{:T(128)} constant(START)
  %begin.1 = s32[] copy(%begin)
  %begun = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}) tuple(%begin.1, %x, %y)
  %while = (s32[], f32[6,8]{1,0}, f32[6,8]{1,0}) while(%begun), condition=%condition, body=%body
  ROOT %r = f32[6,8]{1,0} get-tuple-element(%while), index=2
}
"""


@pytest.mark.parametrize(("start", "step", "turns"), [(0, 1, 6), (1, 1, 5), (0, 2, 3), (1, 2, 3)])
def test_turns_follow_from_counter_step_and_end(start: int, step: int, turns: int):
    text = SCAN.replace("START", str(start)).replace("STEP", str(step))
    module = Module(text)
    (loop,) = [i for i in module.computations["main"].values() if i.opcode == "while"]
    assert module.turns(loop, "main") == turns
    assert Program(text).unknown_loops == 0


def test_a_loop_that_does_not_tell_is_counted_as_unknown():
    assert Program(SCAN.replace("direction=LT", "direction=NE")).unknown_loops == 1
    assert Program(SCAN.replace("constant(6)", "parameter(1)")).unknown_loops == 1


def test_a_scan_reads_a_layer_a_turn_and_writes_in_place():
    layer, counter = 8 * 4, 4
    # Each turn: a layer is read into on-chip memory and written from there, each at the counter; the counter is read, with a
    # constant, to be added to and to be compared, which writes a truth value.
    turn = 2 * (layer + counter) + 2 * (counter + counter) + 1
    touched = Program(SCAN.replace("START", "0").replace("STEP", "1")).bytes_touched
    assert touched == 6 * turn + 2 * counter  # and the counter's copy


@pytest.mark.parametrize(
    ("line", "left", "kernel", "flops"),
    [
        # A plain product of [4, 8] and [8, 16].
        (
            "f32[4,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
            "f32[4,8]",
            "f32[8,16]",
            2 * 4 * 8 * 16,
        ),
        # Two contracted axes: one is a window over all of its axis.
        (
            "f32[4,1,16]{2,1,0} convolution(%a, %b), window={size=3}, dim_labels=b0f_0io->b0f",
            "f32[4,3,8]",
            "f32[3,8,16]",
            2 * 4 * 3 * 8 * 16,
        ),
        # A batch of 8 products: a window that meets one element and holes.
        (
            "f32[8,4,16]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8},"
            " dim_labels=0bf_0io->0bf",
            "f32[8,4,2]",
            "f32[8,2,16]",
            2 * 8 * 4 * 2 * 16,
        ),
        # An axis of the kernel alone: 5 windows that meet the element, and padding.
        (
            "f32[5,4,16]{2,1,0} convolution(%a, %b), window={size=5 pad=4_4}, dim_labels=0bf_0io->0bf",
            "f32[1,4,2]",
            "f32[5,2,16]",
            2 * 5 * 4 * 2 * 16,
        ),
    ],
)
def test_products_written_as_convolutions(line: str, left: str, kernel: str, flops: int):
    text = (
        f"ENTRY %main (a: {left}, b: {kernel}) -> f32[] {{\n"
        f"  %a = {left}{{0}} parameter(0)\n  %b = {kernel}{{0}} parameter(1)\n  ROOT %c = {line}\n}}\n"
    )
    assert Program(text).flops == flops


def test_a_scan_of_products_compiled_here_counts_them_all():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    kernels = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    found = figures(jax.jit(layers).lower(x, kernels).compile())
    assert found.loops == 1 and found.unknown_loops == 0
    assert found.flops == 5 * 2 * 8 * 16 * 16
    least = (5 * 16 * 16 + 2 * 5 * 8 * 16) * 4  # kernels once, activations in and out of each layer
    assert least <= found.bytes_touched <= 4 * least
