"""Products that are in the tensor cores while others are scaled, where `plgpu.wgmma` alone makes the compiler wait.

ptxas runs all of a kernel's wgmma one after the other (its notes C7518 and C7519) as soon as it has to put in a fence
or a wait of its own in a path that threads may take apart, and the loop over items is one to it. So a sum that goes on
over steps needs `fence` at each of them, and one that starts while another is under way must not be cleared before:
`ask` overwrites its registers.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jmoe.pallas_kernels import simt, simt_marks

LAYOUT = plgpu.Layout.WGMMA
TERMS = 128  # of one row in shared memory, of float8: 128 bytes, swizzled


def fence() -> None:
    """Before the first wgmma of a step whose sums go on from the step before."""
    simt.program(lambda: simt_marks.run("wgmma.fence.sync.aligned;", [], ""))


def ask(rows: Any, columns: Any, transforms: Any) -> Any:
    """rows columns^T, one group of wgmma; not there before `plgpu.wgmma_wait` and `settled`.

    Args:
      rows: `[64, 128]` float8_e4m3fn in shared memory, in tiles of 8 rows of 128 bytes, swizzled.
      columns: `[N, 128]`, likewise.
      transforms: of both.

    Returns:
      `[64, N]` float32 in WGMMA's layout.
    """
    num_columns = columns.shape[0]
    result = plgpu.ShapeDtypeStruct((64, num_columns), jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(transforms)), return_type=result)
    def inlined(_ctx, *operands):
        found = _product([_descriptor(operand) for operand in operands], num_columns)
        layout, f32 = LAYOUT.to_mgpu(), ir.F32Type.get()
        registers = np.empty(layout.registers_shape((64, num_columns)), dtype=object)
        for n, at in enumerate(np.ndindex(registers.shape)):  # 8 columns after the other, of each rows r and r + 8
            pair = [llvm.extractvalue(f32, found, [2 * n + i]) for i in range(2)]
            registers[at] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return inlined(rows, columns)


def settled(found: Any) -> Any:
    """No instruction: what follows takes `found` from behind this place, not from before."""
    result = plgpu.ShapeDtypeStruct(found.shape, found.dtype, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=result)
    def inlined(_ctx, found):
        return fragmented_array.optimization_barrier(found)

    return inlined(found)


def _descriptor(operand: Any) -> Any:
    """Of a tile with its terms side by side: swizzle of 128 bytes, 1 KB from 8 rows to the next 8 (PTX ISA 9.7.15)."""
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, simt.mosaic.memref_ptr(operand))
    sixteens = arith.shrui(arith.andi(address, arith.constant(i64, 0x3FFFF)), arith.constant(i64, 4))
    return arith.ori(sixteens, arith.constant(i64, 1 << 62 | (1024 >> 4) << 32 | 1 << 16))


def _product(descriptors: list[Any], num_columns: int) -> Any:
    """The struct of a thread's floats; the first instruction overwrites them."""
    count = num_columns // 2
    sums = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    kind = f"wgmma.mma_async.sync.aligned.m64n{num_columns}k32.f32.e4m3.e4m3"
    text = f"{{ .reg .b64 a, b; .reg .pred go_on; mov.b64 a, ${count}; mov.b64 b, ${count + 1};\n"
    text += "wgmma.fence.sync.aligned;\n"
    for n in range(TERMS // 32):
        text += f"setp.ne.b32 go_on, {int(n > 0)}, 0;\n{kind} {sums}, a, b, go_on, 1, 1;\n"
        text += "add.s64 a, a, 2; add.s64 b, b, 2;\n"
    text += "wgmma.commit_group.sync.aligned; }"
    struct = llvm.StructType.get_literal([ir.F32Type.get()] * count)
    kinds = ",".join(["=f"] * count + ["l", "l"])
    return llvm.inline_asm(struct, descriptors, text, kinds, has_side_effects=True)
