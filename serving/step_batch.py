"""StepBatch: fills the executor's packed inputs from a scheduled call. No JAX."""

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.serving.requests import Request
from jmoe.serving.scheduler import Call
from jmoe.step_inputs import OWN_TOKEN, StepInputs

# Columns that stay as they are while a request keeps its slot.
_PARAMS = ("top_k", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FIXED = ("num_prompt", "seed", *_PARAMS)


class StepBatch:
    """A host copy of every slot's fixed columns and page table, so that a call of 1024 slots fills in about 3 ms.

    A slot is written when its request first appears in a call, and its page table when the request has new pages. A
    call is filled right after `Scheduler.schedule` made it: planning the next one may take pages back.
    """

    def __init__(self, cell: CellConfig):
        self.cell = cell
        self._slots = StepInputs(cell, "decode")
        self._columns = {name: self._slots[name] for name in (*_FIXED, "stop_ids", "page_table")}
        self._tenants: dict[tuple[int, int, int], tuple[Request, int]] = {}  # slot -> request, its admission
        self._num_pages: dict[tuple[int, int, int], int] = {}

    def fill(self, call: Call) -> StepInputs:
        """Packs a call; the array is new, so the executor may keep it."""
        page_table = self._columns["page_table"]
        for work in call.work:
            if self._tenants.get(work.slot) != (work.request, work.request.num_admissions):
                self._write_slot(work.slot, work.request)
            known, page_ids = self._num_pages[work.slot], work.request.page_ids
            if known != len(page_ids):  # pages are only ever added while a request keeps its slot
                page_table[work.slot][known : len(page_ids)] = page_ids[known:]
                self._num_pages[work.slot] = len(page_ids)
        inputs = StepInputs(self.cell, call.kind)
        if call.kind == "decode":
            self._fill_decode(inputs, call)
        else:
            self._fill_prefill(inputs, call)
        return inputs

    def _fill_decode(self, inputs: StepInputs, call: Call) -> None:
        """Rows without a request keep num_tokens 0 and the idle page. Each slot feeds the token that it made last."""
        index = call.index()
        inputs.array[index] = self._slots.array[index]
        inputs["slot"][...] = np.arange(self.cell.rows)
        inputs["num_tokens"][index] = 1
        inputs["sample"][index] = 1
        inputs["token_ids"][(*index, 0)] = OWN_TOKEN
        inputs["start_pos"][index] = [work.start_pos for work in call.work]
        inputs["remaining"][index] = [work.remaining for work in call.work]

    def _fill_prefill(self, inputs: StepInputs, call: Call) -> None:
        """One row a lane: the chunk's tokens, and the fixed columns of the request's decode slot."""
        index = call.index()
        slots = tuple(np.array([work.slot for work in call.work], np.intp).T)
        for name in (*_FIXED, "stop_ids", "page_table"):
            inputs[name][index] = self._columns[name][slots]
        inputs["slot"][index] = slots[2]
        for place, work in zip(zip(*index, strict=True), call.work, strict=True):
            request, start = work.request, work.start_pos
            inputs["token_ids"][place][: work.num_tokens] = request.tokens(start, start + work.num_tokens)
            inputs["num_tokens"][place] = work.num_tokens
            inputs["start_pos"][place] = start
            inputs["sample"][place] = work.num_samples
            inputs["remaining"][place] = work.remaining
            inputs["reset"][place] = int(start == 0)

    def _write_slot(self, slot: tuple[int, int, int], request: Request) -> None:
        """Writes a new tenant's fixed columns over the old one's."""
        self._columns["num_prompt"][slot] = request.num_prompt
        self._columns["seed"][slot] = request.seed
        for name in _PARAMS:
            self._columns[name][slot] = getattr(request.params, name)
        stop_ids = self._columns["stop_ids"][slot]
        stop_ids[:] = -1
        stop_ids[: len(request.stop_ids)] = request.stop_ids
        self._columns["page_table"][slot] = 0
        self._tenants[slot] = (request, request.num_admissions)
        self._num_pages[slot] = 0
