"""The schedule: every stage once, nothing read before it is there, no lane twice at once, no idle tick when full."""

import itertools

import pytest

from jmoe.schedule import Exchange, Schedule, Stage, Tick, build_schedule

CASES = list(itertools.product(range(1, 5), range(1, 7), ("one", "both")))
cases = pytest.mark.parametrize("schedule", [build_schedule(*case) for case in CASES], ids=map(str, CASES))


def stages(num_layers: int, num_micro_batches: int) -> list[Stage]:
    return [Stage(layer, i) for layer in range(num_layers) for i in range(num_micro_batches)]


def times(schedule: Schedule) -> list[int]:
    """When each listed tick can happen at the earliest, by `Tick`'s words alone; a tick that can never happen fails."""
    span, when = schedule.compute_ticks, []
    started: dict[tuple[str, Stage], int] = {}
    brought: dict[tuple[str, Stage], int] = {}
    free = {"attention": 0, "expert": 0}
    for tick in schedule.ticks:
        time = when[-1] + 1 if when else 0
        for role, reads in (("attention", "combine"), ("expert", "dispatch")):
            if (stage := getattr(tick, role)) is None:
                continue
            source = Stage(stage.layer - 1, stage.micro_batch) if role == "attention" else stage
            first = role == "attention" and stage.layer == 0
            assert first or (reads, source) in brought, f"{role} {stage} starts before its {reads} is there"
            time = max(time, free[role], 0 if first else brought[reads, source] + 1)
        for name, role in (("dispatch", "attention"), ("combine", "expert")):
            if tick.exchange is not None and (stage := getattr(tick.exchange, name)) is not None:
                assert (role, stage) in started, f"the {name} of {stage} carries what nobody made"
                time = max(time, started[role, stage] + span)
        for role in free:
            if (stage := getattr(tick, role)) is not None:
                started[role, stage] = time
                free[role] = time + span
        if tick.exchange is not None:
            for name in ("dispatch", "combine"):
                brought[name, getattr(tick.exchange, name)] = time
        when.append(time)
    return when


@cases
def test_every_stage_runs_once_and_every_exchange_happens_once(schedule):
    layers, m = schedule.num_layers, schedule.num_micro_batches
    attention = [t.attention for t in schedule.ticks if t.attention]
    assert sorted(attention, key=str) == sorted(stages(layers + 1, m), key=str)
    for carried in (
        [t.expert for t in schedule.ticks if t.expert],
        [e.dispatch for e in schedule.exchanges if e.dispatch],
        [e.combine for e in schedule.exchanges if e.combine],
    ):
        assert sorted(carried, key=str) == sorted(stages(layers, m), key=str)


@cases
def test_nothing_is_read_before_it_is_there_and_no_lane_is_used_twice_at_once(schedule):
    """`times` asserts the first; that its times are the promised ones says that no lane had to wait for the second."""
    m, span = schedule.num_micro_batches, schedule.compute_ticks
    period = max(m, 4 if schedule.directions == "both" else 3)
    for tick, time in zip(schedule.ticks, times(schedule), strict=True):
        carried = tick.exchange or Exchange()
        lanes = {0: tick.attention, span: carried.dispatch, span + 1: tick.expert, 2 * span + 1: carried.combine}
        for delay, stage in lanes.items():
            assert stage is None or time == span * (stage.layer * period + stage.micro_batch) + delay


@cases
def test_the_walker_can_take_the_ticks_one_by_one(schedule):
    """In the order of the list, a tick reads only what ticks before it made: its own exchange may run beside it."""
    made, arrived = set(), set()
    for tick in schedule.ticks:
        assert tick != Tick(), "an empty tick"
        if tick.exchange is not None:
            assert tick.exchange != Exchange(), "an exchange of nothing"
            assert {("A", tick.exchange.dispatch), ("E", tick.exchange.combine)} - {("A", None), ("E", None)} <= made
        if tick.expert is not None:
            assert ("D", tick.expert) in arrived
        if tick.attention is not None and tick.attention.layer:
            assert ("C", Stage(tick.attention.layer - 1, tick.attention.micro_batch)) in arrived
        made |= {("A", tick.attention), ("E", tick.expert)}
        if tick.exchange is not None:
            arrived |= {("D", tick.exchange.dispatch), ("C", tick.exchange.combine)}


@cases
def test_one_direction_an_exchange_where_that_was_asked(schedule):
    carried = [(e.dispatch is not None) + (e.combine is not None) for e in schedule.exchanges]
    assert max(carried) == 1 or schedule.directions == "both"
    fewest = schedule.num_layers * schedule.num_micro_batches
    assert sum(carried) == 2 * fewest and (schedule.directions == "both" or len(carried) == 2 * fewest)


@cases
def test_micro_batches_keep_their_order_in_every_lane(schedule):
    order = stages(schedule.num_layers + 1, schedule.num_micro_batches)
    lanes = (
        [t.attention for t in schedule.ticks], [t.expert for t in schedule.ticks],
        [e.dispatch for e in schedule.exchanges], [e.combine for e in schedule.exchanges],
    )  # fmt: skip
    for lane in lanes:
        positions = [order.index(stage) for stage in lane if stage is not None]
        assert positions == sorted(positions)


@pytest.mark.parametrize(("directions", "full"), [("both", 4), ("one", 3)])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_no_lane_idles_in_steady_state_from_m_up(num_layers, directions, full):
    """Attention starts a stage every span ticks from the first to the head, experts from their first to their last."""
    for m in (full, full + 1, full + 3):
        schedule = build_schedule(num_layers, m, directions)
        when = times(schedule)
        for lane in ("attention", "expert"):
            starts = [time for tick, time in zip(schedule.ticks, when, strict=True) if getattr(tick, lane)]
            assert {b - a for a, b in itertools.pairwise(starts)} == {schedule.compute_ticks}


@pytest.mark.parametrize(("directions", "full"), [("both", 4), ("one", 3)])
def test_fewer_micro_batches_leave_bubbles(directions, full):
    schedule = build_schedule(3, full - 1, directions)
    starts = [time for tick, time in zip(schedule.ticks, times(schedule), strict=True) if tick.attention]
    assert {b - a for a, b in itertools.pairwise(starts)} > {schedule.compute_ticks}


def test_the_chain_of_three_micro_batches_with_one_direction_an_exchange():
    """D0 D1 C0 D2 C1 D0' C2 ..., as the design page writes it."""
    names = []
    for e in build_schedule(3, 3, "one").exchanges:
        letter, stage = ("D", e.dispatch) if e.dispatch else ("C", e.combine)
        assert stage is not None
        names.append(f"{letter}{stage.micro_batch}" + "'" * stage.layer)
    first = "D0 D1 C0 D2 C1"
    second = "D0' C2 D1' C0' D2' C1'"
    third = "D0'' C2' D1'' C0'' D2'' C1'' C2''"
    assert " ".join(names) == f"{first} {second} {third}"


def test_lockstep_of_four_micro_batches_by_hand():
    """One layer, m = 4: compute, exchange, compute, exchange; the second half of the exchanges carry both ways."""
    a = [Stage(0, i) for i in range(4)]
    head = [Stage(1, i) for i in range(4)]
    assert build_schedule(1, 4, "both").ticks == (
        Tick(a[0]),
        Tick(a[1], None, Exchange(a[0])),
        Tick(a[2], a[0], Exchange(a[1])),
        Tick(a[3], a[1], Exchange(a[2], a[0])),
        Tick(head[0], a[2], Exchange(a[3], a[1])),
        Tick(head[1], a[3], Exchange(None, a[2])),
        Tick(head[2], None, Exchange(None, a[3])),
        Tick(head[3]),
    )


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_roles_that_call_alone_come_to_the_end_with_m_messages_under_way_at_most(num_layers, m):
    schedule = build_schedule(num_layers, m, "separate")
    under_way: dict[str, list[Stage]] = {"attention": [], "expert": []}  # by receiver
    walked: dict[str, list[Stage]] = {"attention": [], "expert": []}
    most = 0

    def play(role, other):
        """Yields while it waits."""
        nonlocal most
        made = None
        for tick in schedule.ticks_of(role):
            call, stage = tick.exchange or Exchange(), getattr(tick, role)
            sent, needed = (call.dispatch, call.combine) if role == "attention" else (call.combine, call.dispatch)
            assert sent == made
            if sent is not None:
                under_way[other].append(sent)
                most = max(most, len(under_way[other]))
            while needed is not None and not under_way[role]:
                yield
            assert needed is None or under_way[role].pop(0) == needed
            if stage is None:
                continue
            reads = Stage(stage.layer - 1, stage.micro_batch) if role == "attention" else stage
            assert needed == (reads if reads.layer >= 0 else None)
            walked[role].append(stage)
            made = stage if stage.layer < num_layers else None

    players = [play("attention", "expert"), play("expert", "attention")]
    for _ in range(2 * m * (num_layers + 1)):
        for player in players:
            next(player, None)
    assert walked == {"attention": stages(num_layers + 1, m), "expert": stages(num_layers, m)}
    assert not any(under_way.values()) and most <= m


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1, "one"), "least 1, got 0 and 1"), ((1, 0, "one"), "least 1, got 1 and 0"), ((1, 1, "auto"), "'auto'")],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(*arguments)
