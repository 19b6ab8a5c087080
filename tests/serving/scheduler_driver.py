"""What scheduler tests share: requests, and an executor that answers every sample with the same token."""

from array import array

import numpy as np
from fake_executor import EOS

from jmoe.serving.requests import Request, SamplingParams

STOP, OTHER = EOS, 7


def add(scheduler, name, num_prompt=5, max_tokens=6, **params):
    prompt = array("i", [1 + i % 50 for i in range(num_prompt)])
    request = Request(str(name), prompt, SamplingParams(**params), max_tokens, stop_ids=(STOP,))
    scheduler.add(request)
    return request


def tokens_for(scheduler, call, stops=(), ended=()):
    """What an executor would answer: OTHER for every sample, STOP as the last one of requests named in `stops`.

    Rows of requests in `ended` idle: a call before has stopped them, which the scheduler may not know yet.
    """
    cell = scheduler.cell
    shape = (cell.num_steps, cell.mesh.attention, cell.mesh.num_micro_batches, cell.rows)
    if call.kind == "prefill":
        shape = (1, *shape[1:3], 1)
    tokens = np.full(shape, -1, np.int32)
    for work, place in zip(call.work, zip(*call.index(), strict=True), strict=True):
        if work.request.id in ended:
            continue
        tokens[(slice(0, work.num_samples), *place)] = OTHER
        if work.request.id in stops and work.num_samples:
            num = min(2, work.num_samples)
            tokens[(num - 1, *place)] = STOP
            tokens[(slice(num, None), *place)] = -1
    return tokens


def step(scheduler, stops=()):
    call = scheduler.schedule()
    scheduler.check_integrity()
    if call is not None:
        scheduler.update(call, tokens_for(scheduler, call, stops))
        scheduler.check_integrity()
    return call


def run_all(scheduler, limit=2000):
    calls = []
    while call := step(scheduler):
        calls.append(call)
        assert len(calls) < limit, "the scheduler goes round in circles"
    assert not scheduler.waiting and not scheduler.running
    assert all(allocator.num_used == 0 for allocator in scheduler.slots.allocators)
    return calls
