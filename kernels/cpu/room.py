"""Room on the stack for pre-activations, or for a tile of a product."""

from __future__ import annotations

from numba.extending import intrinsic

from fastlstm.kernels.cpu.cell_step import GATES
from fastlstm.kernels.cpu.gemm_microkernel import MC
from fastlstm.kernels.cpu.vector import llvm_vector

__all__ = ["MOST_ROWS", "make_room"]

MOST_ROWS = MC  # `schedule.is_short` never has more


@intrinsic
def make_room(typingctx, pointer):
    """Return a pointer to room for the gates of :data:`MOST_ROWS` rows, a vector each.

    It is there until the function ends in which this stands, be that inlined or not.
    """

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            found = builder.alloca(llvm_vector(pointer.dtype), MOST_ROWS * GATES)
        return builder.bitcast(found, args[0].type)

    return pointer(pointer), codegen
