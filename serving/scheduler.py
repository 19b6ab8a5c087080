"""Scheduler: continuous batching over slots, chunked prefill, preemption. No JAX, no threads, no clock.

A request waits, gets a slot with pages for all its known tokens, is prefilled chunk by chunk and then decoded until it
ends. Admission is strictly first come, first served, so nobody starves. When a replica runs out of pages its latest
arrival gives its own back and returns to the queue, where its place is still before all that came after it; later its
prompt and output so far are computed again, and the output goes on as if nothing had happened.

Several calls may be in flight: `schedule` plans the next one as if those in flight emit all that they may, and `update`
brings their tokens later, oldest first. A row that a stop token ends meanwhile idles on device until its end is known
here. The device runs calls in the order in which they were scheduled, each on the state that the one before left, so
slots and pages given back here are free at once: whoever gets them next writes to them in a later call.
"""

import bisect
import dataclasses
from collections import deque
from typing import Literal, NamedTuple

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.serving.requests import FinishReason, Request, RequestState, Slot
from jmoe.serving.slots import Slots


class Work(NamedTuple):
    """What one call does for one request."""

    request: Request
    slot: Slot
    num_tokens: int  # tokens fed: a chunk in prefill, 1 in decode
    num_samples: int  # tokens that come back unless a stop token ends it: 0 or 1 in prefill, up to num_steps in decode
    start_pos: int  # position of the first token fed
    remaining: int  # tokens that may still be generated, those of this call included


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of the executor: a prefill chunk for some lanes, or num_steps decode steps for all decoding slots."""

    kind: Literal["prefill", "decode"]
    work: tuple[Work, ...]

    @property
    def sampling(self) -> bool:
        """Whether any request in the call needs more than argmax."""
        return any(work.request.params.needs_sampling for work in self.work)

    def index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each work stands in arrays of [M, m, rows]; prefill has one row a lane, whatever the slot."""
        replica, micro_batch, row = np.array([work.slot for work in self.work], np.intp).T
        return replica, micro_batch, row if self.kind == "decode" else np.zeros_like(row)


class Progress(NamedTuple):
    """New tokens of one request; token i came from step i of the call."""

    request: Request
    tokens: list[int]
    work_idx: int  # which of the call's works


class Scheduler:
    """Decides what runs next.

    Args:
      cell: sizes of the programs.
      max_prefill_streak: prefill calls in a row while something could decode; decode calls never come twice in a row
        while something waits for prefill.
    """

    def __init__(self, cell: CellConfig, max_prefill_streak: int = 1):
        if max_prefill_streak < 1:
            raise ValueError(f"Scheduler.max_prefill_streak: expected at least 1, got {max_prefill_streak}")
        self.cell = cell
        self.slots = Slots(cell)
        self.waiting: deque[Request] = deque()  # in order of arrival
        self.running: dict[str, Request] = {}
        self.ending: dict[str, Request] = {}  # without a slot: their last tokens are in flight
        self.num_preemptions = 0
        self._max_prefill_streak = max_prefill_streak
        self._prefill_streak = 0
        self._num_arrivals = 0
        self._in_flight: deque[Call] = deque()

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue.

        Raises:
          ValueError: prompt and max_tokens don't fit into max_len. (What fits there fits alone into a replica's pages:
            CellConfig sees to it.)
        """
        total = request.num_prompt + request.max_tokens
        if request.num_prompt < 1 or request.max_tokens < 1 or total > self.cell.max_len:
            raise ValueError(
                f"request {request.id}: expected a prompt and max_tokens of at least 1 each and of at most "
                f"{self.cell.max_len} tokens (max_len) together, got {request.num_prompt} and {request.max_tokens}"
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and frees its slot and pages; what is in flight for it is dropped later."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.slot is not None:
            self._leave(request)
        self.ending.pop(request.id, None)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def schedule(self) -> Call | None:
        """Chooses the next call and takes the pages that it needs; None if there is nothing to do (yet)."""
        self._release_ending()
        self._admit()
        prefill = self._prefill_work()
        decode_turn = not prefill or self._prefill_streak >= self._max_prefill_streak
        decode = self._decode_work() if decode_turn else ()
        if decode:
            self._prefill_streak = 0
            return self._plan(Call("decode", decode))
        if prefill := self._prefill_work() if decode_turn else prefill:  # decode may have preempted some of it
            self._prefill_streak += 1
            return self._plan(Call("prefill", prefill))
        return None

    def update(self, call: Call, tokens: np.ndarray) -> list[Progress]:
        """Takes a call's tokens, ends the requests that are done and returns what is new.

        Args:
          call: the oldest one that `schedule` returned and that has not been here.
          tokens: `StepOutputs.tokens`, [num_steps, M, m, rows] int32, -1 where nothing was emitted.

        Raises:
          RuntimeError: another call, or tokens that the call can't have produced.
        """
        if not self._in_flight or call is not self._in_flight[0]:
            raise RuntimeError("Scheduler.update: expected the oldest call in flight, got another one")
        columns = self._columns(call, tokens)
        self._in_flight.popleft()
        progress = []
        for i, (work, column) in enumerate(zip(call.work, columns, strict=True)):
            work.request.num_in_flight -= work.num_samples
            if work.request.state is not RequestState.FINISHED and (new := self._advance(call, work, column)):
                progress.append(Progress(work.request, new, i))
        return progress

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def check_integrity(self) -> None:
        """Raises RuntimeError, with the numbers, unless queue, slots and pages agree with one another."""
        self.slots.check_integrity()
        bound = {request.id for lane in self.slots.lanes.values() for request in lane.values()}
        if bound != self.running.keys():
            raise RuntimeError(f"scheduler: {len(self.running)} running requests, {len(bound)} in slots")
        arrivals = [request.arrival for request in self.waiting]
        if arrivals != sorted(set(arrivals)):
            raise RuntimeError(f"scheduler: expected the queue in order of arrival, got {arrivals}")
        for request in self.waiting:
            if request.state is not RequestState.WAITING or request.slot or request.page_ids or request.num_computed:
                raise RuntimeError(
                    f"request {request.id}: waits in state {request.state.value} with slot {request.slot}, "
                    f"{len(request.page_ids)} pages and {request.num_computed} computed positions"
                )
        for request in self.running.values():
            known = request.num_tokens + request.num_in_flight
            expected = request.num_computed if request.is_prefilling else known - 1
            if request.state is not RequestState.RUNNING or request.num_computed != expected:
                raise RuntimeError(
                    f"request {request.id}: runs in state {request.state.value} with {request.num_computed} of "
                    f"{known} positions computed, {request.prefill_len} by prefill"
                )
        for request in self.ending.values():
            if request.state is not RequestState.RUNNING or request.slot or request.page_ids or request.remaining:
                raise RuntimeError(
                    f"request {request.id}: ends in state {request.state.value} with slot {request.slot}, "
                    f"{len(request.page_ids)} pages and {request.remaining} tokens to come"
                )

    def _plan(self, call: Call) -> Call:
        """Books a call as if it emitted all that it may: the next one is planned before its tokens are known."""
        for work in call.work:
            work.request.num_computed += work.num_tokens if call.kind == "prefill" else work.num_samples
            work.request.num_in_flight += work.num_samples
        self._in_flight.append(call)
        return call

    def _release_ending(self) -> None:
        """Frees the slots of requests whose last token is in flight, so that others are admitted meanwhile."""
        for request in [r for r in self.running.values() if r.remaining == 0]:
            self._leave(request)
            self.ending[request.id] = request

    def _admit(self) -> None:
        """Moves requests from the head of the queue into slots, with pages for all tokens known so far.

        One that was preempted in flight waits for its last tokens first: they are computed again with the others.
        """
        while self.waiting and self.waiting[0].num_in_flight == 0:
            request = self.waiting[0]
            if (lane := self.slots.best_lane(request.num_tokens)) is None:
                return
            self.waiting.popleft()
            self.slots.bind(request, lane)
            self.slots.grow(request, request.num_tokens)
            request.state = RequestState.RUNNING
            request.prefill_len = request.num_tokens
            request.num_admissions += 1
            self.running[request.id] = request

    def _prefill_work(self) -> tuple[Work, ...]:
        """The next chunk of each lane's earliest arrival that is not computed yet."""
        works = []
        for lane in self.slots.lanes.values():
            if prefilling := [request for request in lane.values() if request.is_prefilling]:
                request = min(prefilling, key=_arrival)
                left = request.prefill_len - request.num_computed
                num_tokens = min(left, self.cell.chunk_len)
                samples = int(num_tokens == left)
                place = (request.num_computed, request.remaining)
                works.append(Work(request, _slot(request), num_tokens, samples, *place))
        return tuple(works)

    def _decode_work(self) -> tuple[Work, ...]:
        """All decoding slots, each with pages for its next steps; the latest arrivals may be preempted for it."""
        works = []
        decoding = sorted((r for r in self.running.values() if not r.is_prefilling), key=_arrival)
        for request in decoding:  # a victim is never one that already has its work: those arrived before
            if request.slot is not None:
                num_samples = min(self.cell.num_steps, request.remaining)
                if self._make_room(request, request.num_computed + num_samples):
                    works.append(Work(request, request.slot, 1, num_samples, request.num_computed, request.remaining))
        return tuple(works)

    def _make_room(self, request: Request, num_positions: int) -> bool:
        """Gets pages, preempting the replica's latest arrivals one by one; False if that was the request itself."""
        replica = _slot(request).replica
        while not self.slots.grow(request, num_positions):
            victim = max((r for r in self.running.values() if _slot(r).replica == replica), key=_arrival)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Takes slot and pages from a running request; prompt and output stay, to be computed again."""
        self._leave(request)
        request.state = RequestState.WAITING
        bisect.insort(self.waiting, request, key=_arrival)  # before all that came later, that is at the front
        self.num_preemptions += 1

    def _leave(self, request: Request) -> None:
        """Takes a request out of its slot."""
        del self.running[request.id]
        self.slots.release(request)
        request.num_computed = request.prefill_len = 0

    def _columns(self, call: Call, tokens: np.ndarray) -> list[list[int]]:
        """Each work's column of the call's tokens."""
        num_steps, num_rows = (1, 1) if call.kind == "prefill" else (self.cell.num_steps, self.cell.rows)
        mesh = self.cell.mesh
        shape = (num_steps, mesh.attention, mesh.num_micro_batches, num_rows)
        if tokens.shape != shape or tokens.min() < -1 or tokens.max() >= self.cell.model.vocab_size:
            raise RuntimeError(
                f"{call.kind}: expected tokens of shape {shape}, -1 to {self.cell.model.vocab_size - 1}, "
                f"got {tokens.shape}, {tokens.min()} to {tokens.max()}"
            )
        return tokens[(slice(None), *call.index())].T.tolist()

    def _advance(self, call: Call, work: Work, column: list[int]) -> list[int]:
        """Appends a work's new tokens to its request, and ends it where they say so."""
        request = work.request
        new = column[: column.index(-1)] if -1 in column else column
        stops = [step for step, token in enumerate(new) if token in request.stop_ids]
        complete = stops == [len(new) - 1] if stops else len(new) == work.num_samples
        if not complete or len(new) > work.num_samples or len(new) + column.count(-1) != len(column):
            raise RuntimeError(
                f"request {request.id} in slot {tuple(work.slot)}: expected {work.num_samples} tokens from "
                f"{call.kind}, or fewer up to a stop token, got {column}"
            )
        request.output_ids.extend(new)
        if stops or len(request.output_ids) == request.max_tokens:
            self.finish(request, FinishReason.STOP if stops else FinishReason.LENGTH)
        return new


def _arrival(request: Request) -> int:
    return request.arrival


def _slot(request: Request) -> Slot:
    assert request.slot is not None, f"request {request.id} is not in a slot"
    return request.slot
