"""StepInputs: what the host tells the attention mesh for one call, packed into one int32 array. No JAX.

One array means one transfer a device: `[M, m, rows, width]`, a row per decode slot (or per prefill chunk), columns as
`StepLayout` names them. Floats travel as their bits.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

from jmoe.cell_config import CellConfig

INT_COLUMNS = (
    "num_tokens",  # valid tokens of this row in this call; 0 = the row is idle
    "start_pos",  # position of the row's first token = tokens that its KV pages already hold
    "slot",  # the request's decode slot within its micro-batch (penalty counts live there)
    "sample",  # 1: sample a token after the last valid one (always in decode; the prompt's last chunk in prefill)
    "remaining",  # tokens that may still be generated, this call included
    "num_prompt",  # prompt length: tokens at or after this position are output (for penalties and seeds)
    "reset",  # 1: the slot's penalty counts start anew (a request's first chunk)
    "seed",
    "top_k",  # 0 = off
)
FLOAT_COLUMNS = (
    "temperature",  # 0 = greedy
    "top_p",  # 1 = off
    "min_p",  # 0 = off
    "repetition_penalty",  # 1 = off
    "presence_penalty",  # 0 = off
    "frequency_penalty",  # 0 = off
)

OWN_TOKEN = -1  # in `token_ids` of a decode row: the token that its slot made in the call before, still on device


@dataclasses.dataclass(frozen=True, slots=True)
class StepLayout:
    """Where each column of a packed row starts."""

    num_rows: int
    num_tokens: int  # width of the `token_ids` block: 1 in decode, chunk_len in prefill
    num_stop_ids: int
    num_pages: int

    @classmethod
    def of(cls, cell: CellConfig, kind: Literal["prefill", "decode"]) -> "StepLayout":
        if kind == "decode":
            return cls(cell.rows, 1, cell.max_stop_ids, cell.max_pages)
        return cls(1, cell.chunk_len, cell.max_stop_ids, cell.max_pages)

    @property
    def columns(self) -> dict[str, slice]:
        """Name -> slice of the last axis; single columns are slices of length 1. Not to be changed."""
        return _columns(self)

    @property
    def width(self) -> int:
        return max(s.stop for s in self.columns.values())


@functools.cache
def _columns(layout: StepLayout) -> dict[str, slice]:
    sizes = dict.fromkeys(INT_COLUMNS + FLOAT_COLUMNS, 1)
    sizes |= {"token_ids": layout.num_tokens, "stop_ids": layout.num_stop_ids, "page_table": layout.num_pages}
    columns, start = {}, 0
    for name, size in sizes.items():
        columns[name] = slice(start, start + size)
        start += size
    return columns


class StepInputs:
    """A packed batch that the host fills by name: `inputs["seed"][replica, micro_batch, row] = 7`.

    Single columns read as `[M, m, rows]`; `token_ids`, `stop_ids` (padded with -1) and `page_table` (padded with
    page 0) keep their last axis. Float columns are float32 views of the same memory.
    """

    def __init__(self, cell: CellConfig, kind: Literal["prefill", "decode"]):
        self.layout = StepLayout.of(cell, kind)
        shape = (cell.mesh.attention, cell.mesh.num_micro_batches, self.layout.num_rows, self.layout.width)
        self.array = np.zeros(shape, np.int32)
        for name, value in (("stop_ids", -1), ("top_p", 1.0), ("repetition_penalty", 1.0)):
            self[name][...] = value

    def __getitem__(self, name: str) -> np.ndarray:
        part = self.array[..., self.layout.columns[name]]
        if name in FLOAT_COLUMNS:
            part = part.view(np.float32)
        return part[..., 0] if name in INT_COLUMNS + FLOAT_COLUMNS else part


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutputs:
    """What one call brings back to the host.

    Attributes:
      tokens: `[num_steps, M, m, rows]` int32; -1 where a row emitted nothing. num_steps is 1 in prefill.
      logprobs: of the chosen tokens, `[num_steps, M, m, rows]` float32; None from greedy programs.
      top_ids, top_logprobs: `[num_steps, M, m, rows, num_top_logprobs]`; None from greedy programs.
      dropped_rows: rows that found no room in a bounded capacity (0 in the dropless default).
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    dropped_rows: int = 0
