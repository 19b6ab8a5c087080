"""What is fixed of a grouped product when its kernel is compiled, and the shared memory that follows from it."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.grouped_matmul import SCALED, ExpertBlocks, GroupedBlocks

HALF = 64  # columns of one wgmma, and of one tile of the result
ROWS = 64  # of one consumer, where rows stand first
SMEM_BYTES = 225 * 1024  # of 227, the rest for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Product:
    """What is fixed when the kernel is compiled."""

    rows: int
    num_in: int
    num_out: int
    num_experts: int
    parts: int  # blocks of weights in a stage
    split: Literal["gated", "columns", "terms"]  # what several parts are: gate and up, or neighbours in one operand
    small: bool  # float8
    out_dtype: Any
    blocks: GroupedBlocks
    num_sms: int
    interpret: bool
    older_groups: bool
    row_parts: int = 1  # blocks of rows that a stage has room for
    to_float8: bool = False  # whether results are rounded to float8

    @property
    def gated(self) -> bool:
        return self.split == "gated"

    @property
    def rows_first(self) -> bool:
        """Whether consumers share the rows, not the columns: `grouped_multiply_rows`."""
        return isinstance(self.blocks, ExpertBlocks) and self.blocks.rows_first

    @property
    def row_copies(self) -> int:
        """Of one part of a stage's rows: where rows stand first, one a consumer, of which a short block needs one."""
        return self.blocks.consumers if self.rows_first else 1

    @property
    def share(self) -> int:
        """Columns of one consumer in a part."""
        return self.blocks.block_out // (1 if self.rows_first else self.blocks.consumers)

    @property
    def depth(self) -> int:
        """The sum's terms in a stage."""
        return self.blocks.block_in * (self.parts if self.split == "terms" else 1)

    @property
    def steps(self) -> int:
        """Of an item."""
        return self.num_in // self.depth

    @property
    def tiles(self) -> int:
        """Items side by side."""
        return self.num_out // (self.blocks.block_out * (self.parts if self.split == "columns" else 1))

    @property
    def sums(self) -> list[tuple[int, int]]:
        """(part, number of HALF columns) of each sum of a consumer."""
        parts = 1 if self.split == "terms" else self.parts
        return [(part, half) for part in range(parts) for half in range(self.share // HALF)]

    def column(self, tile: Any, part: int) -> Any:
        """The first column of an item's part, in the weights."""
        return (tile * self.parts + part if self.split == "columns" else tile) * self.blocks.block_out

    def term(self, step: Any, part: int) -> Any:
        """The first term of a step's part, in the weights."""
        return step * self.depth + (part * self.blocks.block_in if self.split == "terms" else 0)

    @property
    def in_dtype(self) -> Any:
        return jnp.float8_e4m3fn if self.small else jnp.bfloat16

    @property
    def stage_bytes(self) -> int:
        b = self.blocks
        rows = b.block_rows * self.row_parts
        return (self.parts * b.block_out + rows) * b.block_in * jnp.dtype(self.in_dtype).itemsize

    @property
    def out_tiles(self) -> tuple[int, ...]:
        """Of results in shared memory: one a consumer, or all, where float8 needs 128 columns for a scale."""
        if self.rows_first:
            return self.blocks.consumers, ROWS, SCALED
        tiles = self.blocks.block_out // HALF if self.to_float8 else self.blocks.consumers
        return tiles, self.blocks.block_rows, HALF

    @property
    def out_bytes(self) -> int:
        return math.prod(self.out_tiles) * jnp.dtype(self.out_dtype).itemsize

    @property
    def out_transforms(self) -> tuple[Any, ...]:
        return () if self.interpret else transforms(self.out_dtype)

    @property
    def other_bytes(self) -> int:
        """Of shared memory, beside the stages."""
        return self.out_bytes + (1 + self.blocks.consumers) * 3 * (self.num_experts + 1) * 4

    @property
    def stages(self) -> int:
        fits = (SMEM_BYTES - self.other_bytes) // self.stage_bytes
        return min(self.blocks.num_stages or fits, fits)


def both_products(
    num_rows: int, num_experts: int, hidden: int, width: int, blocks: ExpertBlocks, small: bool, num_sms: int = 0,
    interpret: bool = False,
) -> tuple[Product, Product]:  # fmt: skip
    """The gated and the down product of one kernel, of equal stages."""
    common: Any = {"num_experts": num_experts, "parts": 2, "small": small, "out_dtype": jnp.dtype(jnp.bfloat16),
                   "blocks": blocks, "num_sms": num_sms, "interpret": interpret, "older_groups": False,
                   "row_parts": 2 if blocks.terms else 1, "to_float8": small}  # fmt: skip
    gated = Product(num_rows, hidden, width, split="gated", **common)
    return gated, Product(num_rows, width, hidden, split="terms" if blocks.terms else "columns", **common)


def check_blocks(shape: Product) -> None:
    b = shape.blocks
    fits = (
        b.block_rows % 8 == 0
        and 8 <= b.block_rows <= min(256, shape.rows)
        and shape.num_out % b.block_out == 0
        and b.block_out % (64 * b.consumers) == 0
        and shape.num_in % b.block_in == 0
        and b.block_in % (SCALED if shape.small else 64) == 0
    )
    if not fits or shape.stages < 2:
        raise ValueError(
            f"grouped_matmul: expected block_rows a multiple of 8 up to min(256, rows), block_out a multiple of 64 a "
            f"consumer that divides out, block_in a multiple of {SCALED if shape.small else 64} that divides in, two "
            f"stages of shared memory at least; got {b} for rows {shape.rows}, in {shape.num_in}, out {shape.num_out}"
        )


def scratch(shape: Product) -> list[Any]:
    """Shared memory: stages of weights and rows, tiles of results, words, full, free, and where consumers meet."""
    b, stages = shape.blocks, shape.stages
    tiled = transforms(shape.in_dtype)
    tile = (b.block_out, b.block_in) if shape.small else (b.block_in, b.block_out)
    return [
        plgpu.SMEM((stages, shape.parts, *tile), shape.in_dtype, transforms=tiled),
        plgpu.SMEM((stages, shape.row_parts, b.block_rows, b.block_in), shape.in_dtype, transforms=tiled),
        plgpu.SMEM(shape.out_tiles, shape.out_dtype, transforms=shape.out_transforms),
        plgpu.SMEM((1 + b.consumers, 3, shape.num_experts + 1), jnp.int32),
        plgpu.Barrier(num_arrivals=shape.row_parts * shape.row_copies + shape.parts, num_barriers=stages),
        plgpu.Barrier(num_arrivals=b.consumers, num_barriers=stages),
        plgpu.Barrier(num_arrivals=b.consumers),
    ]


def transforms(dtype: Any) -> tuple[Any, ...]:
    """As wgmma and TMA want a tile: 8 rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
