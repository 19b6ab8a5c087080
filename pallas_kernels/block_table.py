"""Block sizes that were measured to be best, by device kind, op, dtype and shape bucket.

An op asks `find_blocks` first and falls back to its own heuristic; `benchmarks/tune_blocks.py` measures and writes. The
table is block_table.json beside this file: {kind: {"op dtype": {bucket: {"blocks": ..., "us": ..., "from": ...}}}}.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

TABLE = pathlib.Path(__file__).with_name("block_table.json")
DEFAULT_KIND = "h100"  # what a program that is compiled without a GPU at hand is taken to be for
ALIKE = {"h200": "h100", "h800": "h100", "h20": "h100"}  # the same processors beside other memory


def device_kind(name: str | None = None) -> str:
    """ "h100" from "NVIDIA H100 80GB HBM3"; None is the GPU at hand, or DEFAULT_KIND where there is none."""
    if name is None:
        if jax.default_backend() != "gpu":
            return DEFAULT_KIND
        name = str(jax.devices()[0].device_kind)
    found = re.search(r"\b([a-z]{1,2}\d{1,4}[a-z]*)\b", name.lower())
    return found.group(1) if found else name.lower()


def bucket(shape: Mapping[str, int]) -> str:
    """Every size rounded up to a power of two, in the order of the names: "experts=128 rows=256"."""
    return " ".join(f"{name}={1 << max(size - 1, 0).bit_length()}" for name, size in sorted(shape.items()))


def find_blocks(
    op: str, dtype: Any, shape: Mapping[str, int], *, kind: str | None = None, table: pathlib.Path = TABLE
) -> dict[str, int] | None:
    """The measured block sizes of an op, or None where the table has none.

    Args:
      op: the public function's name.
      dtype: of the weights or the cache.
      shape: the sizes that the choice depends on, by name.
      kind: a device kind as JAX names it, or None (see `device_kind`).
      table: the file.

    Returns:
      Whatever the tuner wrote: names to sizes.
    """
    kinds = _load(table)
    own = device_kind(kind)
    for name in (own, ALIKE.get(own, own)):
        entry = kinds.get(name, {}).get(_op_key(op, dtype), {}).get(bucket(shape))
        if entry is not None:
            return dict(entry["blocks"])
    return None


def write_blocks(
    op: str,
    dtype: Any,
    shape: Mapping[str, int],
    blocks: Mapping[str, int],
    *,
    us: float,
    measured: str,
    kind: str | None = None,
    table: pathlib.Path = TABLE,
) -> None:
    """Puts one measured choice into the table; `measured` says on what (device, versions)."""
    kinds = json.loads(table.read_text()) if table.exists() else {}
    entry = {"blocks": dict(blocks), "us": round(us, 2), "from": measured}
    kinds.setdefault(device_kind(kind), {}).setdefault(_op_key(op, dtype), {})[bucket(shape)] = entry
    table.write_text(json.dumps(kinds, indent=1, sort_keys=True) + "\n")
    _load.cache_clear()


def _op_key(op: str, dtype: Any) -> str:
    return f"{op} {jax.numpy.dtype(dtype).name}"


@functools.cache
def _load(table: pathlib.Path) -> dict[str, Any]:
    return json.loads(table.read_text())
