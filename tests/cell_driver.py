"""A minimal host for tests: static slots and pages, every prompt prefilled chunk by chunk, then decode calls."""

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.step_inputs import StepInputs


def slot_of(cell: CellConfig, n: int) -> tuple[int, int, int]:
    """(replica, micro_batch, row) of request n: replicas first, then micro-batches, then rows."""
    replica, rest = n % cell.mesh.attention, n // cell.mesh.attention
    return replica, rest % cell.mesh.num_micro_batches, rest // cell.mesh.num_micro_batches


def pages_of(cell: CellConfig, n: int) -> np.ndarray:
    """Request n's own pages, scattered over the pool."""
    replica, micro_batch, row = slot_of(cell, n)
    index = row * cell.mesh.num_micro_batches + micro_batch
    pool = np.random.default_rng(replica).permutation(np.arange(1, cell.num_pages))
    return pool[index * cell.max_pages : (index + 1) * cell.max_pages]


def generate(run, cell: CellConfig, prompts, max_tokens: int, params=None, sampling: bool = False, stop=()):
    """Greedy (or sampled) tokens of every prompt.

    Args:
      run: (kind, sampling), inputs array -> {"tokens": [steps, M, m, rows], ...}; one runtime or several in step.
      params: per prompt a dict of StepInputs columns to set.

    Returns:
      A list of token lists, one a prompt, and the raw results of every call.
    """
    out = [[] for _ in prompts]
    results = []

    def fill(inputs, n, row):
        r, m, slot = slot_of(cell, n)
        at = (r, m, row)
        inputs["slot"][at] = slot
        inputs["page_table"][at] = pages_of(cell, n)
        inputs["num_prompt"][at] = len(prompts[n])
        inputs["remaining"][at] = max_tokens - len(out[n])
        inputs["stop_ids"][at][: len(stop)] = stop
        for name, value in (params[n] if params else {}).items():
            inputs[name][at] = value
        return at

    waiting = dict.fromkeys(range(len(prompts)), 0)
    while waiting:
        inputs, taken = StepInputs(cell, "prefill"), {}
        for n, done in list(waiting.items()):
            r, m, _ = slot_of(cell, n)
            if (r, m) in taken.values():
                continue
            at = fill(inputs, n, 0)
            taken[n] = (r, m)
            chunk = prompts[n][done : done + cell.chunk_len]
            inputs["token_ids"][at][: len(chunk)] = chunk
            inputs["start_pos"][at], inputs["num_tokens"][at] = done, len(chunk)
            inputs["reset"][at] = done == 0
            inputs["sample"][at] = done + len(chunk) == len(prompts[n])
            waiting[n] = done + len(chunk)
        result = run(("prefill", sampling), inputs.array)
        results.append(result)
        for n, (r, m) in taken.items():
            token = int(result["tokens"][0, r, m, 0])
            if waiting[n] == len(prompts[n]):
                assert token >= 0, "the prompt's last chunk samples a token"
                out[n].append(token)
                del waiting[n]
            else:
                assert token == -1, "other chunks don't"
    ended = {n for n in range(len(prompts)) if out[n][-1] in stop}
    while any(n not in ended and len(out[n]) < max_tokens for n in range(len(prompts))):
        inputs = StepInputs(cell, "decode")
        for n in range(len(prompts)):
            if n in ended or len(out[n]) >= max_tokens:
                continue
            at = fill(inputs, n, slot_of(cell, n)[2])
            inputs["token_ids"][at] = out[n][-1]
            inputs["start_pos"][at] = len(prompts[n]) + len(out[n]) - 1
            inputs["num_tokens"][at] = inputs["sample"][at] = 1
        result = run(("decode", sampling), inputs.array)
        results.append(result)
        for n in range(len(prompts)):
            r, m, row = slot_of(cell, n)
            out[n] += [int(t) for t in result["tokens"][:, r, m, row] if t >= 0]
            if out[n][-1] in stop:
                ended.add(n)
    return out, results
