"""The scheduler: who runs next, where, and with which pages."""

import numpy as np
import pytest
from fake_executor import make_cell
from scheduler_driver import OTHER, STOP, add, run_all, step, tokens_for

from jmoe.serving.requests import FinishReason, RequestState
from jmoe.serving.scheduler import Scheduler


def names(call):
    return sorted(work.request.id for work in call.work)


def test_nothing_to_do_is_none():
    assert Scheduler(make_cell()).schedule() is None


@pytest.mark.parametrize("num_prompt", [1, 7, 8, 9, 16, 17, 24])
def test_a_prompt_is_cut_into_chunks_and_sampled_at_the_last_one(num_prompt):
    scheduler = Scheduler(make_cell(chunk_len=8))
    request = add(scheduler, "a", num_prompt, max_tokens=1)
    calls = run_all(scheduler)
    works = [call.work[0] for call in calls]
    assert [call.kind for call in calls] == ["prefill"] * (-(-num_prompt // 8))
    assert sum(work.num_tokens for work in works) == num_prompt
    assert [work.num_samples for work in works] == [0] * (len(works) - 1) + [1]
    assert request.finish_reason is FinishReason.LENGTH and request.output_ids.tolist() == [OTHER]


def test_a_decode_call_takes_pages_for_its_steps_and_no_more_than_remain():
    scheduler = Scheduler(make_cell(num_steps=4, page_len=4))
    request = add(scheduler, "a", num_prompt=4, max_tokens=6)
    step(scheduler)
    assert len(request.page_ids) == 1
    call = scheduler.schedule()
    assert call.kind == "decode" and call.work[0].num_samples == 4
    assert len(request.page_ids) == 2  # positions 4 to 7
    scheduler.update(call, tokens_for(scheduler, call))
    call = scheduler.schedule()
    assert call.work[0].num_samples == 1 and len(request.page_ids) == 3  # position 8; the last token is never written
    scheduler.update(call, tokens_for(scheduler, call))
    assert request.finish_reason is FinishReason.LENGTH and len(request.output_ids) == 6


def test_requests_spread_over_replicas_and_micro_batches():
    scheduler = Scheduler(make_cell(attention=2, micro_batches=2, rows=2))
    requests = [add(scheduler, i) for i in range(9)]
    scheduler.schedule()
    lanes = [request.slot[:2] for request in requests[:8]]
    assert sorted(lanes[:4]) == sorted(lanes[4:]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {lane[0] for lane in lanes[:2]} == {0, 1}
    assert requests[8].slot is None and list(scheduler.waiting) == requests[8:]


def test_a_newcomer_takes_the_emptiest_lane():
    scheduler = Scheduler(make_cell(attention=2, micro_batches=2, rows=2))
    requests = [add(scheduler, i, max_tokens=20) for i in range(7)]
    step(scheduler)
    gone = requests[2].slot
    scheduler.finish(requests[2], FinishReason.ABORT)
    late = add(scheduler, "late")
    step(scheduler)
    assert late.slot[:2] in (gone[:2], (1, 1))
    assert len(scheduler.slots.lanes[late.slot[:2]]) == 2


def test_a_prefill_call_takes_one_chunk_from_every_lane_earliest_arrival_first():
    scheduler = Scheduler(make_cell(micro_batches=2, rows=2, chunk_len=8))
    for i in range(4):
        add(scheduler, i, num_prompt=12)
    calls = [step(scheduler) for _ in range(2)]
    assert [names(call) for call in calls] == [["0", "1"], ["0", "1"]]
    kinds = [(call.kind, names(call)) for call in (step(scheduler) for _ in range(4))]
    assert kinds == [
        ("decode", ["0", "1"]),
        ("prefill", ["2", "3"]),
        ("decode", ["0", "1"]),
        ("prefill", ["2", "3"]),
    ]


@pytest.mark.parametrize("streak", [1, 3])
def test_prefill_and_decode_take_turns(streak):
    scheduler = Scheduler(make_cell(micro_batches=1, rows=2, chunk_len=2, num_steps=1), max_prefill_streak=streak)
    add(scheduler, "decoding", num_prompt=1, max_tokens=30)
    step(scheduler)
    step(scheduler)
    add(scheduler, "long", num_prompt=24)
    kinds = "".join(step(scheduler).kind[0] for _ in range(8))
    assert kinds == ("p" * streak + "d") * (8 // (streak + 1)) + "p" * (8 % (streak + 1))


def test_first_come_first_served_even_if_a_later_one_would_fit():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=4, num_pages=17, page_len=4, max_len=64))
    first = add(scheduler, "first", num_prompt=40, max_tokens=20)
    step(scheduler)
    big = add(scheduler, "big", num_prompt=40)
    small = add(scheduler, "small", num_prompt=2)
    step(scheduler)
    assert first.slot and not big.slot and not small.slot
    run_all(scheduler)
    assert big.finish_reason and small.finish_reason


def test_the_latest_arrival_gives_its_pages_back_and_stands_first_in_the_queue():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=2, num_pages=17, page_len=4, max_len=64, num_steps=4))
    old = add(scheduler, "old", num_prompt=20, max_tokens=30)
    young = add(scheduler, "young", num_prompt=20, max_tokens=30)
    behind = add(scheduler, "behind")
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert old.state is RequestState.RUNNING and young.state is RequestState.WAITING
    assert list(scheduler.waiting) == [young, behind]
    so_far = young.output_ids.tolist()
    assert so_far and young.num_computed == 0 and young.page_ids == [] and young.num_prompt == 20
    while young.slot is None:
        step(scheduler)
    assert young.prefill_len == 20 + len(so_far)
    run_all(scheduler)
    assert young.output_ids[: len(so_far)].tolist() == so_far and len(young.output_ids) == 30
    assert old.num_admissions == 1 and young.num_admissions >= 2


def test_a_shortage_in_one_replica_leaves_the_other_alone():
    scheduler = Scheduler(make_cell(2, 1, rows=2, num_pages=17, page_len=4, max_len=64))
    requests = [add(scheduler, i, num_prompt=20, max_tokens=max_tokens) for i, max_tokens in enumerate((40, 6, 40, 2))]
    step(scheduler)
    assert [request.slot.replica for request in requests] == [0, 1, 0, 1]
    tail = add(scheduler, "tail", num_prompt=4, max_tokens=40)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert tail.slot.replica == 1 and list(scheduler.waiting) == [requests[2]]


def test_decode_that_preempts_itself_leaves_only_prefill_that_still_has_its_slot():
    """`middle` decodes and takes 5 pages a call; `late` gives up 4, which is not enough, so both must go."""
    cell = make_cell(micro_batches=3, rows=1, page_len=1, chunk_len=1, num_steps=5, max_len=30, num_pages=36)
    scheduler = Scheduler(cell)
    early = add(scheduler, "early", num_prompt=20, max_tokens=5)
    add(scheduler, "middle", num_prompt=1, max_tokens=20)
    add(scheduler, "late", num_prompt=4, max_tokens=5)
    calls = [step(scheduler) for _ in range(6)]
    assert [call.kind[0] for call in calls] == ["p", "d", "p", "d", "p", "p"]
    assert scheduler.num_preemptions == 2 and names(calls[-1]) == ["early"]
    run_all(scheduler)
    assert early.num_admissions == 1


def test_a_preempted_request_samples_again_only_after_all_of_its_tokens():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=2, num_pages=17, page_len=4, max_len=64, chunk_len=8))
    add(scheduler, "old", num_prompt=20, max_tokens=30)
    young = add(scheduler, "young", num_prompt=20, max_tokens=30)
    works = [(call.kind, work) for call in run_all(scheduler) for work in call.work if work.request is young]
    prefills = [work for kind, work in works if kind == "prefill"]
    assert sum(work.num_samples for work in prefills) == young.num_admissions >= 2
    assert sum(work.num_samples for _, work in works) == 30


def test_a_request_of_max_len_runs_alone_in_the_smallest_pool():
    cell = make_cell(num_pages=17, page_len=4, max_len=64)
    scheduler = Scheduler(cell)
    request = add(scheduler, "all", num_prompt=60, max_tokens=4)
    tiny = add(scheduler, "tiny", num_prompt=1, max_tokens=1)
    run_all(scheduler)
    assert request.num_tokens == 64 and tiny.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(0, 1), (5, 0), (60, 5), (65, 1)])
def test_what_does_not_fit_is_refused_with_the_numbers(num_prompt, max_tokens):
    with pytest.raises(ValueError, match=f"64 tokens.*got {num_prompt} and {max_tokens}"):
        add(Scheduler(make_cell(max_len=64)), "big", num_prompt, max_tokens)


def test_a_stop_token_ends_a_request_in_prefill_and_in_decode():
    scheduler = Scheduler(make_cell(num_steps=4))
    early, late = add(scheduler, "early"), add(scheduler, "late")
    step(scheduler, stops={"early"})
    assert early.finish_reason is FinishReason.STOP and early.output_ids.tolist() == [STOP]
    step(scheduler, stops={"late"})
    assert late.finish_reason is FinishReason.STOP and late.output_ids.tolist() == [OTHER, OTHER, STOP]
    assert not scheduler.running and scheduler.slots.allocators[0].num_used == 0


def test_pages_of_an_aborted_request_are_free_at_once_and_its_tokens_are_dropped():
    """A later call may write to them: the device runs it after the one in flight."""
    scheduler = Scheduler(make_cell())
    gone, stays = add(scheduler, "gone"), add(scheduler, "stays")
    step(scheduler)
    call = scheduler.schedule()
    scheduler.finish(gone, FinishReason.ABORT)
    scheduler.finish(gone, FinishReason.STOP)  # too late to change anything
    assert gone.state is RequestState.FINISHED and gone.slot is None
    assert scheduler.slots.allocators[0].num_used == len(stays.page_ids)
    scheduler.check_integrity()
    progress = scheduler.update(call, tokens_for(scheduler, call))
    scheduler.check_integrity()
    assert [p.request for p in progress] == [stays] and progress[0].work_idx == 1
    assert gone.finish_reason is FinishReason.ABORT and gone.output_ids.tolist() == [OTHER]


def test_an_abort_while_another_call_is_in_flight_frees_at_once():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=2, chunk_len=8))
    add(scheduler, "first", num_prompt=20)
    second = add(scheduler, "second", num_prompt=20)
    call = scheduler.schedule()
    assert names(call) == ["first"] and second.slot is not None
    scheduler.finish(second, FinishReason.ABORT)
    assert second.slot is None and second.page_ids == []
    waiting = add(scheduler, "third")
    scheduler.finish(waiting, FinishReason.ABORT)
    assert not scheduler.waiting and waiting.finish_reason is FinishReason.ABORT
    scheduler.update(call, tokens_for(scheduler, call))
    scheduler.check_integrity()


def test_calls_return_in_the_order_in_which_they_were_made():
    scheduler = Scheduler(make_cell())
    add(scheduler, "a")
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(RuntimeError, match="another one"):
        scheduler.update(second, tokens_for(scheduler, second))
    for call in (first, second):
        scheduler.update(call, tokens_for(scheduler, call))
    with pytest.raises(RuntimeError, match="another one"):
        scheduler.update(second, tokens_for(scheduler, second))


def test_the_next_call_is_planned_as_if_the_one_in_flight_emitted_all_that_it_may():
    scheduler = Scheduler(make_cell(num_steps=4, page_len=4))
    request = add(scheduler, "a", num_prompt=5, max_tokens=7)
    prefill, decode, last = (scheduler.schedule() for _ in range(3))
    assert [(call.kind, *call.work[0][2:]) for call in (prefill, decode, last)] == [
        ("prefill", 5, 1, 0, 7),
        ("decode", 1, 4, 5, 6),
        ("decode", 1, 2, 9, 2),
    ]
    assert len(request.page_ids) == 3 and not request.output_ids  # positions 0 to 10; the last token is never written
    assert scheduler.schedule() is None
    for call in (prefill, decode, last):
        scheduler.update(call, tokens_for(scheduler, call))
        scheduler.check_integrity()
    assert request.finish_reason is FinishReason.LENGTH and len(request.output_ids) == 7


def test_a_slot_whose_last_token_is_in_flight_is_given_on_meanwhile():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=1))
    first, second = add(scheduler, "first", max_tokens=5), add(scheduler, "second")
    calls = [scheduler.schedule() for _ in range(3)]
    assert [names(call) for call in calls] == [["first"], ["first"], ["second"]]
    assert first.slot is None and first.state is RequestState.RUNNING and first.finish_reason is None
    assert second.slot == calls[0].work[0].slot
    scheduler.check_integrity()
    assert [[p.request for p in scheduler.update(c, tokens_for(scheduler, c))] for c in calls] == [
        [first],
        [first],
        [second],
    ]
    assert first.finish_reason is FinishReason.LENGTH and not scheduler.ending


def test_an_abort_of_a_request_whose_last_token_is_in_flight():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=1))
    request = add(scheduler, "a", max_tokens=1)
    call = scheduler.schedule()
    assert scheduler.schedule() is None and scheduler.ending
    scheduler.finish(request, FinishReason.ABORT)
    assert scheduler.update(call, tokens_for(scheduler, call)) == []
    assert not scheduler.ending and request.finish_reason is FinishReason.ABORT


def test_a_row_that_a_stop_token_ended_is_in_the_next_call_and_brings_nothing():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=1, num_steps=4))
    request, behind = add(scheduler, "a", max_tokens=20), add(scheduler, "behind")
    step(scheduler)
    stopped, idle = scheduler.schedule(), scheduler.schedule()
    scheduler.update(stopped, tokens_for(scheduler, stopped, stops={"a"}))
    assert request.finish_reason is FinishReason.STOP and request.slot is None
    nothing = np.full((4, 1, 1, 1), -1, np.int32)
    later = scheduler.schedule()
    assert names(later) == ["behind"] and behind.slot == idle.work[0].slot
    assert scheduler.update(idle, nothing) == []
    assert [p.request for p in scheduler.update(later, tokens_for(scheduler, later))] == [behind]


def test_a_request_preempted_in_flight_keeps_the_tokens_that_come_and_is_admitted_after_them():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=2, num_pages=17, page_len=4, max_len=64, num_steps=4))
    add(scheduler, "old", num_prompt=20, max_tokens=30)
    young = add(scheduler, "young", num_prompt=20, max_tokens=30)
    calls = []
    while scheduler.num_preemptions == 0:
        calls.append(scheduler.schedule())
    scheduler.check_integrity()
    assert young.num_in_flight > 4 and not young.output_ids and young.state is RequestState.WAITING
    for call in calls[:-1]:
        assert young.slot is None
        scheduler.update(call, tokens_for(scheduler, call))
        scheduler.check_integrity()
    assert young.num_in_flight == 0 and len(young.output_ids) > 4
    kept = len(young.output_ids)
    scheduler.update(calls[-1], tokens_for(scheduler, calls[-1]))
    run_all(scheduler)
    assert young.num_admissions == 2 and len(young.output_ids) == 30 > kept


def _short(tokens):
    tokens[0] = -1


def _gap(tokens):
    tokens[1] = -1


def _stop_and_go(tokens):
    tokens[0] = STOP


def _too_many(tokens):
    tokens[:] = OTHER


def _too_big(tokens):
    tokens[0] = 101


def _negative(tokens):
    tokens[0] = -2


@pytest.mark.parametrize("damage", [_short, _gap, _stop_and_go, _too_many, _too_big, _negative])
def test_tokens_that_no_program_can_have_made_are_refused(damage):
    scheduler = Scheduler(make_cell(micro_batches=1, rows=1))
    add(scheduler, "a", max_tokens=4)
    step(scheduler)
    call = scheduler.schedule()
    tokens = tokens_for(scheduler, call)
    assert tokens.reshape(-1).tolist() == [OTHER, OTHER, OTHER, -1]
    damage(tokens)
    with pytest.raises(RuntimeError, match="expected"):
        scheduler.update(call, tokens)


def test_tokens_of_another_shape_are_refused():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=1))
    add(scheduler, "a")
    call = scheduler.schedule()
    with pytest.raises(RuntimeError, match=r"shape \(1, 1, 1, 1\).*got \(2, 1, 1, 1\)"):
        scheduler.update(call, np.zeros((2, 1, 1, 1), np.int32))


def test_one_request_that_needs_sampling_makes_the_call_a_sampling_call():
    scheduler = Scheduler(make_cell(micro_batches=1, rows=2, chunk_len=8))
    add(scheduler, "plain", num_prompt=8, max_tokens=12)
    add(scheduler, "warm", num_prompt=8, max_tokens=2, temperature=1.0)
    seen = [(call.kind[0], names(call), call.sampling) for call in run_all(scheduler)]
    assert seen == [
        ("p", ["plain"], False),
        ("d", ["plain"], False),
        ("p", ["warm"], True),
        ("d", ["plain", "warm"], True),
        ("d", ["plain"], False),
    ]


def test_everyone_ends_in_a_crowd_with_few_pages():
    scheduler = Scheduler(make_cell(attention=2, micro_batches=3, rows=2, num_pages=20, page_len=4, max_len=64))
    requests = [add(scheduler, i, num_prompt=1 + 7 * i % 40, max_tokens=1 + 5 * i % 24) for i in range(60)]
    run_all(scheduler)
    assert all(len(r.output_ids) == r.max_tokens and r.finish_reason is FinishReason.LENGTH for r in requests)
    assert scheduler.num_preemptions > 0
