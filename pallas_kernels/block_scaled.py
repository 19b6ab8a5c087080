"""BlockScaled: float8 weights with one scale a block of 128x128, and rows with one scale a token and 128 columns."""

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 128
FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448.0  # of FLOAT8; beyond 464 the conversion gives NaN
SMALLEST_AMAX = 1e-12  # a block of zeros gets a scale that is a normal number still


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """Weights w[..., o, i] = values[..., o, i] * scales[..., o // 128, i // 128].

    The contracted axis stands last (K-major): Hopper's float8 wgmma reads both operands so, and Hugging Face's
    block-scaled checkpoints keep them so.

    Attributes:
      values: `[..., out, in]` float8_e4m3fn.
      scales: `[..., ceil(out / 128), ceil(in / 128)]` float32.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: `[..., out, in]`."""
        return self.values.shape

    def check(self, name: str) -> None:
        """Raises ValueError where dtypes or shapes don't belong together."""
        *lead, out, width = self.values.shape
        expected = (*lead, num_blocks(out), num_blocks(width))
        if self.values.dtype != FLOAT8 or self.scales.dtype != jnp.float32 or self.scales.shape != expected:
            raise ValueError(
                f"{name}: expected float8_e4m3fn values [..., out, in] and float32 scales {expected}, got "
                f"{self.values.dtype} {self.values.shape} and {self.scales.dtype} {self.scales.shape}"
            )

    def dequantize(self) -> jax.Array:
        """The weights as float32 `[..., out, in]`."""
        out, width = self.values.shape[-2:]
        scales = jnp.repeat(jnp.repeat(self.scales, BLOCK, axis=-1)[..., :width], BLOCK, axis=-2)[..., :out, :]
        return self.values.astype(jnp.float32) * scales


def num_blocks(size: int) -> int:
    """Blocks of 128 that cover `size`."""
    return -(-size // BLOCK)


def quantize_blocks(weights: jax.Array) -> BlockScaled:
    """scale = amax / 448 of each 128x128 block, values = weights * (1 / scale) rounded to nearest even.

    Args:
      weights: `[..., out, in]`, any float type.

    Returns:
      The same weights as `BlockScaled`.
    """
    *lead, out, width = weights.shape
    rows, columns = num_blocks(out), num_blocks(width)
    padding = [(0, 0)] * len(lead) + [(0, rows * BLOCK - out), (0, columns * BLOCK - width)]
    blocks = jnp.pad(weights.astype(jnp.float32), padding).reshape(*lead, rows, BLOCK, columns, BLOCK)
    scales = _scales(jnp.max(jnp.abs(blocks), axis=(-3, -1)))
    values = _rounded(blocks * (1 / scales)[..., :, None, :, None]).reshape(*lead, rows * BLOCK, columns * BLOCK)
    return BlockScaled(values[..., :out, :width], scales)


def quantize_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """scale = amax / 448 of each row's 128 columns, values = rows * (1 / scale), as DeepSeek-V3.

    A row's numbers depend on that row alone, so neither its neighbours nor a cut of the columns at a multiple of 128
    changes them.

    Args:
      rows: `[..., in]`, any float type.

    Returns:
      values `[..., in]` float8_e4m3fn and scales `[..., ceil(in / 128)]` float32.
    """
    *lead, width = rows.shape
    columns = num_blocks(width)
    padding = [(0, 0)] * len(lead) + [(0, columns * BLOCK - width)]
    blocks = jnp.pad(rows.astype(jnp.float32), padding).reshape(*lead, columns, BLOCK)
    scales = _scales(jnp.max(jnp.abs(blocks), axis=-1))
    values = _rounded(blocks * (1 / scales)[..., None]).reshape(*lead, columns * BLOCK)
    return values[..., :width], scales


def dequantize_rows(values: jax.Array, scales: jax.Array) -> jax.Array:
    """values * scales of their 128 columns: float32 `[..., in]`, the inverse of `quantize_rows` but for rounding."""
    return values.astype(jnp.float32) * jnp.repeat(scales, BLOCK, axis=-1)[..., : values.shape[-1]]


def _scales(amax: jax.Array) -> jax.Array:
    # Products, not quotients, here and by 1 / scale: XLA makes such of divisions where it likes, and bits would differ.
    return jnp.maximum(amax, SMALLEST_AMAX) * jnp.float32(1 / LARGEST)


def _rounded(scaled: jax.Array) -> jax.Array:
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(FLOAT8)
