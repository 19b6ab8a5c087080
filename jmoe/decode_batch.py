"""A synthetic decode batch, for measurements. No JAX."""

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.step_inputs import StepInputs


def decode_batch(cell: CellConfig, context: int) -> StepInputs:
    """A full decode batch whose every row has `context` tokens in its own pages, random last tokens.

    Raises:
      ValueError: a page pool too small for that.
    """
    inputs = StepInputs(cell, "decode")
    shape = inputs["num_tokens"].shape
    inputs["num_tokens"][...] = inputs["sample"][...] = 1
    inputs["slot"][...] = np.arange(cell.rows)
    inputs["start_pos"][...] = context
    inputs["num_prompt"][...] = context
    inputs["remaining"][...] = cell.max_len - context
    inputs["token_ids"][...] = np.random.default_rng(0).integers(0, cell.model.vocab_size, (*shape, 1))
    per_replica = shape[1] * shape[2]
    if per_replica * cell.max_pages > cell.num_pages - 1:
        raise ValueError(
            f"decode_batch: expected pages for {per_replica} rows of {cell.max_len} tokens "
            f"({1 + per_replica * cell.max_pages} with the idle one), got {cell.num_pages}"
        )
    pages = 1 + np.arange(per_replica * cell.max_pages).reshape(*shape[1:], cell.max_pages)
    inputs["page_table"][...] = pages
    return inputs
