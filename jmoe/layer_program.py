"""run_layer: a layer's function traced and lowered once, however many layers, micro-batches and steps run it.

Layers of a model differ in their arrays alone. Unrolled, each was traced anew and its Mosaic kernels lowered anew: for
12 layers of Qwen3 28 s of Python a program, all under the interpreter's lock, and 23 s of XLA. As a jitted function of
the layer's arrays it is traced for the first one; the others become calls of the same function, which XLA inlines, and
equal kernels are compiled once: 5 and 8 s.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jmoe.cell_config import CellConfig


def run_layer(function: Callable[..., Any], cell: CellConfig, module: nnx.Module, *arrays: Any) -> Any:
    """function(cell, module, *arrays), shared between modules of the same structure and array shapes.

    Args:
      function: of a module's scope, not a closure: it is told by identity.
      cell: what else the trace may depend on.
      module: one layer, its parameters arrays or tracers.
      arrays: trees of arrays.
    """
    graph, params = nnx.split(module)
    return _jitted(function, cell, graph, params, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(function, cell, graph, params, *arrays):
    return function(cell, nnx.merge(graph, params), *arrays)
