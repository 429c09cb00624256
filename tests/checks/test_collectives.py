"""What is read from the text of a compiled program: which collectives, how often, how large, and what hides them."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_vlm.checks.collectives import collectives
from big_vlm.sharding import mesh as meshes

SCHEDULE = """HloModule jit_f, is_scheduled=true

%fused (p: bf16[8]) -> f32[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %convolution.1 = f32[8]{0} convolution(%p, %p), dim_labels=bf_io->bf
}

%elementwise (p: bf16[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%p, %p)
}

%condition (state: (s32[], bf16[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(7)
  %state = (s32[]{:T(128)}, bf16[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT, metadata={op_name="lt"}
}

%body (state: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8]{0:T(1024)(128)(2,1)} get-tuple-element(%state), index=1
  %permute-start = (bf16[8], bf16[8]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %fusion.1 = f32[8]{0} fusion(%x), kind=kOutput, calls=%fused
  %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%elementwise
  %next = s32[]{:T(128)} add(%i, %two), metadata={op_name="add"}
  %permute-done = bf16[8]{0} collective-permute-done(%permute-start)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8]{0}) tuple(%next, /*index=1*/%permute-done)
}

ENTRY %main (x: bf16[8]) -> f32[8] {
  %x = f32[4,8]{1,0} parameter(0)
  %start.1 = (f32[4,8], f32[8,8]) all-gather-start(%x), dimensions={0}
  %one = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%one)
  %tuple.2 = (s32[]{:T(128)}, bf16[8]{0}) tuple(%copy.1, %y)
  %while.1 = (s32[], bf16[8]) while(%tuple.2), condition=%condition, body=%body
  %done.1 = f32[8,8]{1,0} all-gather-done((f32[4,8], f32[8,8]) %start.1)
  %start.2 = (f32[8,8], f32[8,8]) collective-permute-start(%done.1), source_target_pairs={{0,1},{1,0}}
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%elementwise
  %done.2 = f32[8,8]{1,0} collective-permute-done(%start.2)
  ROOT %scattered = f32[4,8]{1,0} reduce-scatter(%done.2), dimensions={0}
}
"""


def test_what_a_schedule_says():
    """By hand: a product in the loop's body is one beside the gather too, and from 1 to 7 by 2 are three times."""
    assert collectives(SCHEDULE) == [
        ('collective-permute', 'body', 'permute-start', 3, 16, 1),
        ('all-gather', 'main', 'start.1', 1, 256, 1),
        ('collective-permute', 'main', 'start.2', 1, 256, 0),
        ('reduce-scatter', 'main', 'scattered', 1, 256, 0),
    ]


def test_a_program_of_this_machine():
    """A sum over eight devices is one all-reduce of what is left, 4 × 6 float32; in a loop of five, five of them."""
    mesh = meshes.make_mesh()

    def body(_, x):
        return jax.shard_map(lambda x: jax.lax.psum(x, 'data'), mesh=mesh, in_specs=P(), out_specs=P())(x) * 0.5

    x = jax.ShapeDtypeStruct((4, 6), np.float32, sharding=NamedSharding(mesh, P()))
    once = jax.jit(lambda x: body(0, x)).lower(x).compile().as_text()
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, body, x)).lower(x).compile().as_text()
    for text, times in ((once, 1), (looped, 5)):
        (row,) = collectives(text)
        assert (row.kind, row.times, row.bytes, row.matmuls) == ('all-reduce', times, 4 * 6 * 4, 0)
