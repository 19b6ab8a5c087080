"""After any sequence of add, finish, abort, preempt, schedule and update: pages are conserved, and everyone ends.

Up to three calls are in flight: what a call brought is known when later ones have long been planned.
"""

import hypothesis
from fake_executor import make_cell
from hypothesis import stateful
from hypothesis import strategies as st
from scheduler_driver import add, run_all, tokens_for

from jmoe.serving.requests import FinishReason, Request, RequestState
from jmoe.serving.scheduler import Call, Scheduler


class SchedulerMachine(stateful.RuleBasedStateMachine):
    """Any sequence of add, abort, schedule and update; an executor that stops requests at whim."""

    @stateful.initialize(
        attention=st.integers(1, 2), micro_batches=st.integers(1, 3), rows=st.integers(1, 3),
        num_pages=st.integers(9, 14), num_steps=st.integers(1, 5), chunk_len=st.integers(1, 9),
        streak=st.integers(1, 2),
    )  # fmt: skip
    def start(self, attention, micro_batches, rows, num_pages, num_steps, chunk_len, streak):
        cell = make_cell(
            attention, micro_batches, rows=rows, num_pages=num_pages, num_steps=num_steps, chunk_len=chunk_len,
            page_len=3, max_len=24,
        )  # fmt: skip
        self.scheduler = Scheduler(cell, streak)
        self.requests: list[Request] = []
        self.calls: list[Call] = []
        self.ended: set[str] = set()  # by a stop token, on device

    @stateful.rule(num_prompt=st.integers(1, 20), max_tokens=st.integers(1, 12))
    def add(self, num_prompt, max_tokens):
        self.requests.append(add(self.scheduler, len(self.requests), num_prompt, min(max_tokens, 24 - num_prompt)))

    @stateful.precondition(lambda self: self.requests)
    @stateful.rule(which=st.integers(0, 10**6), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def finish(self, which, reason):
        live = [r for r in self.requests if r.state is not RequestState.FINISHED] or self.requests
        self.scheduler.finish(live[which % len(live)], reason)

    @stateful.precondition(lambda self: len(self.calls) < 3)
    @stateful.rule()
    def schedule(self):
        live = [r for r in self.requests if r.state is not RequestState.FINISHED]
        call = self.scheduler.schedule()
        assert call is not None or self.calls or not live, "work, but no call"
        if call is None:
            return
        self.calls.append(call)
        for work in call.work:
            assert work.start_pos + work.num_tokens + max(work.num_samples, 1) - 1 <= 3 * len(work.request.page_ids)
            assert work.remaining >= max(work.num_samples, 1)
        if call.kind == "decode":
            decoding = [r for r in self.scheduler.running.values() if not r.is_prefilling]
            assert {id(work.request) for work in call.work} == set(map(id, decoding))

    @stateful.precondition(lambda self: self.calls)
    @stateful.rule(data=st.data())
    def update(self, data):
        call = self.calls.pop(0)
        ids = [work.request.id for work in call.work if work.num_samples]
        stops = data.draw(st.sets(st.sampled_from(ids), max_size=2)) if ids else set()
        lengths = {request.id: len(request.output_ids) for request in self.requests}
        tokens = tokens_for(self.scheduler, call, stops, self.ended)
        self.ended |= stops
        for request, new, work_idx in self.scheduler.update(call, tokens):
            assert call.work[work_idx].request is request
            assert request.output_ids[lengths.pop(request.id) :].tolist() == new
        assert all(len(r.output_ids) == lengths[r.id] for r in self.requests if r.id in lengths)

    @stateful.invariant()
    def pages_are_conserved(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        live = [r for r in self.requests if r.state is not RequestState.FINISHED]
        waiting = [r.id for r in self.scheduler.waiting]
        assert sorted(r.id for r in live) == sorted([*self.scheduler.running, *self.scheduler.ending, *waiting])
        held = [page for r in self.scheduler.running.values() for page in r.page_ids if r.slot.replica == 0]
        assert len(held) == len(set(held))
        if not live:
            assert all(allocator.num_used == 0 for allocator in self.scheduler.slots.allocators)

    def teardown(self):
        if hasattr(self, "scheduler"):
            for call in self.calls:
                self.scheduler.update(call, tokens_for(self.scheduler, call, ended=self.ended))
            run_all(self.scheduler)
            assert all(r.state is RequestState.FINISHED for r in self.requests)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = hypothesis.settings(max_examples=100, stateful_step_count=50, deadline=None)
