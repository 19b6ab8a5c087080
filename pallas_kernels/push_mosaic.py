"""The Mosaic GPU body of push: blocks that send, and blocks that receive, each with its own share and its own flag.

Block b of a round moves every blocks-th unit of the message, a unit being 16 bytes a thread. It tells its twin on the
other device by a flag of its own, so no block waits for another of its device. All blocks fit on the GPU at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt, simt_peer
from jmoe.pallas_kernels.push_call import Call, Line, slot_of
from jmoe.pallas_kernels.push_plan import BLOCK_THREADS, CREDIT_BYTES, TAGGED_UNITS, MailboxMap, Message, PushPlan
from jmoe.pallas_kernels.push_share import Column, Held, Share, smaller, within
from jmoe.pallas_kernels.simt import Pointer, Word
from jmoe.pallas_kernels.simt_peer import Group

EPOCH = 4096  # flags of one message; a flag is epoch * EPOCH + how many of them are done


def push_pallas(plan: PushPlan, table, sequence, rows, counts, columns, index) -> tuple[Any, ...]:
    """The fields of `Pushed`; see `push`."""
    sends, receives, rounds = plan.sends, plan.receives, plan.mailbox.num_rounds
    for message in (sends, receives):
        if message is not None:
            message.check()
    given = [table, sequence.reshape(1)]
    if sends is not None:
        given += [rows.reshape(-1, sends.width), counts, *(c.reshape(-1) for c in columns)]
        given += [] if index is None else [index.reshape(-1)]
    num_blocks = [0 if m is None else rounds * m.blocks(rounds) for m in (sends, receives)]
    types = [jax.ShapeDtypeStruct((sum(num_blocks) * 2,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)]
    if receives is not None:
        places = rounds * receives.capacity
        types += [
            jax.ShapeDtypeStruct((rounds,), jnp.int32),
            jax.ShapeDtypeStruct((places, receives.width), receives.dtype),
        ]
        types += [jax.ShapeDtypeStruct((places * words,), jnp.int32) for words in receives.columns]

    def push_rows(*refs):
        simt.program(_program(plan, num_blocks, index is not None), *refs)

    faults, after, *found = plgpu.kernel(
        push_rows,
        out_type=tuple(types),
        scratch_types=[plgpu.SMEM((4,), jnp.int32)],
        grid=(sum(num_blocks),),
        grid_names=("block",),
    )(*given)
    faults, after = faults.reshape(-1, 2), after.reshape(())
    if receives is None:
        return None, (), None, faults, after
    counts_out, rows_out, *columns_out = found
    shape = (rounds, receives.capacity)
    columns_out = tuple(c.reshape(*shape, w) for c, w in zip(columns_out, receives.columns, strict=True))
    return rows_out.reshape(*shape, receives.width), columns_out, counts_out, faults, after


def _program(plan: PushPlan, num_blocks: list[int], gathers: bool) -> Callable[..., None]:
    def program(table: Pointer, sequence: Pointer, *others: Pointer):
        *rest, shared = others
        taken = (2 + len(plan.sends.columns) + gathers) if plan.sends is not None else 0
        sent, (faults, after, *received) = rest[:taken], rest[taken:]
        call = Call(plan, table, sequence, shared, faults)
        with simt.when(call.block.equals(0) & call.thread.equals(0)):
            after.store(0, call.number(plan.advance))
        if plan.sends is not None:
            with simt.when(call.block < num_blocks[0]):
                _send(call, plan.sends, num_blocks[0], gathers, *sent)
        if plan.receives is not None:
            with simt.when(call.block >= num_blocks[0]):
                _receive(call, plan.receives, num_blocks, *received)

    return program


def _send(call: Call, message: Message, num_blocks: int, gathers: bool, rows, counts, *rest: Pointer) -> None:
    """One block's share of one round's message: wait for the slot, write, say so."""
    given, index = (rest[:-1], rest[-1]) if gathers else (rest, None)
    mailbox, blocks = call.plan.mailbox, message.blocks(call.plan.mailbox.num_rounds)
    r, b, thread = call.block // blocks, call.block % blocks, call.thread
    peer, there = call.peer(r)
    count = within(counts.load(r), message.capacity)
    share = Share(message, count, b, blocks, thread)
    epoch = simt_peer.load_word(call.own, call.block + MailboxMap.sent // 4)
    number = call.number(call.plan.send_offset)
    with simt.when(thread.equals(0)):
        call.say(simt.word(-1), simt.word(-1))

    def source(row: Word) -> Pointer:
        place = smaller(row, simt.word(message.capacity - 1)) + r * message.capacity
        return rows.skip(place if index is None else simt_peer.load_now(index, place), message.row_bytes)

    share.source = source
    places = share.places(simt.word(0))
    with simt.when(there):
        # On their way while the block waits for the slot: the first rows, and each column's first words.
        begun = share.load(places)
        columns = [
            Column(c.skip(r, message.capacity * w * 4), w, share) for c, w in zip(given, message.columns, strict=True)
        ]
        credit = call.own.skip(r, CREDIT_BYTES).skip(simt.word(mailbox.credits), 1)
        ready, _ = call.wait(credit, epoch - (mailbox.num_slots - 1), call.patience())
        with simt.when(ready):
            line, tagged = Line(mailbox, peer, r, b, epoch), share.is_tagged(message)
            with simt.when(thread.equals(0)):
                simt_peer.store_tagged(line.flag, 0, [count, number], line.tag)
            with simt.when(tagged):
                _send_tagged(line, share, begun, columns)
            with simt.when(simt_peer.negated(tagged)):
                _send_bulk(slot_of(call, peer, r, epoch), line, share, begun, columns)
        with simt.when(simt_peer.negated(ready)), simt.when(thread.equals(0)):
            call.give_up(number)
    call.count(MailboxMap.sent, call.block, num_blocks, epoch)


def _receive(call: Call, message: Message, num_blocks: list[int], counts, rows, *columns: Pointer) -> None:
    """One block's share of one round's message: wait for its twin, copy, look at the number."""
    mailbox, blocks = call.plan.mailbox, message.blocks(call.plan.mailbox.num_rounds)
    place = call.block - num_blocks[0]
    r, b, thread = place // blocks, place % blocks, call.thread
    peer, there = call.peer(r)
    epoch = simt_peer.load_word(call.own, place + MailboxMap.received // 4)
    expected = call.number(call.plan.receive_offset)
    with simt.when(thread.equals(0)):
        call.say(simt.word(-1), simt.word(-1))
    with simt.when(there):
        # All that the calls before took is taken: their kernels have ended, so no fence need say so.
        with simt.when(b.equals(0) & thread.equals(0)):
            simt_peer.store_word(peer.skip(r, CREDIT_BYTES), mailbox.credits // 4, epoch)
        simt.barrier()  # the fault's first word is said, and all have read the counter that ends this kernel
        line, patience = Line(mailbox, call.own, r, b, epoch), call.patience()
        everyone = thread >= 0
        arrived, [[count, got]] = simt_peer.wait_tagged([Group(line.flag, 0, 2, everyone)], line.tag, patience)
        share = Share(message, within(count, message.capacity), b, blocks, thread)
        with simt.when(b.equals(0) & thread.equals(0)):
            counts.store(r, arrived.select(share.count, 0))
            with simt.when(arrived & simt_peer.negated(got.equals(expected))):
                call.say(expected, got)
        with simt.when(simt_peer.negated(arrived)):
            call.give_up(expected)
        with simt.when(arrived):
            out = rows.skip(r, message.capacity * message.row_bytes)
            share.target = lambda row: out.skip(row, message.row_bytes)
            targets = [c.skip(r, message.capacity * w * 4) for c, w in zip(columns, message.columns, strict=True)]
            tagged = share.is_tagged(message)
            with simt.when(tagged):
                _take_tagged(call, line, share, targets, expected, patience)
            with simt.when(simt_peer.negated(tagged)):
                _take_bulk(call, slot_of(call, call.own, r, epoch), line, share, targets, expected, patience)
    with simt.when(simt_peer.negated(there)), simt.when(b.equals(0) & thread.equals(0)):
        counts.store(r, 0)
    call.count(MailboxMap.received, place, num_blocks[1], epoch)


def _send_tagged(line: Line, share: Share, begun: list[Held], columns: list[Column]) -> None:
    """What each thread holds goes out with tags, twice the bytes: nothing waits for a fence."""
    for i, held in enumerate(begun[:TAGGED_UNITS]):
        with simt.when(held.place.inside):
            for half, (pointer, index) in enumerate(line.halves(i, share.thread)):
                simt_peer.store_tagged(pointer, index, held.words[half * 2 : half * 2 + 2], line.tag)
    for number, column in enumerate(columns):
        with simt.when(column.inside):
            simt_peer.store_tagged(line.column(number), column.first, [column.held], line.tag)


def _take_tagged(call: Call, line: Line, share: Share, columns: list[Pointer], expected: Word, patience: Word) -> None:
    """Each thread waits for its own words, all of them at once."""
    first, places = share.b * BLOCK_THREADS + share.thread, [share.place(i) for i in range(TAGGED_UNITS)]
    groups = [
        Group(pointer, index, 2, at.inside)
        for i, at in enumerate(places)
        for pointer, index in line.halves(i, share.thread)
    ]
    heard = [first < share.count * words for words in share.message.columns]
    groups += [Group(line.column(number), first, 1, bit) for number, bit in enumerate(heard)]
    arrived, words = simt_peer.wait_tagged(groups, line.tag, patience)
    for i, at in enumerate(places):
        simt_peer.store_vector_if(at.inside & arrived, share.target(at.row), at.vector, words[2 * i] + words[2 * i + 1])
    for target, bit, [word] in zip(columns, heard, words[2 * TAGGED_UNITS :], strict=True):
        with simt.when(bit & arrived):
            target.store(first, word)
    with simt.when(simt_peer.negated(arrived)):
        call.give_up(expected)


def _send_bulk(slot: Pointer, line: Line, share: Share, begun: list[Held], columns: list[Column]) -> None:
    """Plain stores; after each chunk one thread says how far the block is, behind a fence."""
    share.target = lambda row: slot.skip(row, share.message.row_bytes)
    for column, start in zip(columns, share.message.column_starts, strict=True):
        column.store(slot.skip(simt.word(start), 1))

    def release(chunk: Word) -> None:
        simt.barrier()
        with simt.when(share.thread.equals(0)):
            simt_peer.release(line.progress, line.epoch * EPOCH + chunk + 1, simt.word(0))

    def send_chunk(chunk):
        share.move(chunk)
        release(chunk)
        return []

    share.move(0, begun)
    release(simt.word(0))
    simt.loop(1, share.chunks(), 1, [], send_chunk)


def _take_bulk(
    call: Call, slot: Pointer, line: Line, share: Share, columns: list[Pointer], expected: Word, patience: Word
) -> None:
    message = share.message
    share.source = lambda row: slot.skip(row, message.row_bytes)

    def first_chunk() -> None:
        begun = share.load(share.places(simt.word(0)))
        sent = [
            Column(slot.skip(simt.word(start), 1), words, share)
            for start, words in zip(message.column_starts, message.columns, strict=True)
        ]
        for column, target in zip(sent, columns, strict=True):
            column.store(target)
        share.move(0, begun)

    def take(chunk: Word, patience: Word, copy: Callable[[], None]) -> None:
        reached, _ = call.wait(line.progress, line.epoch * EPOCH + chunk + 1, patience)
        with simt.when(reached):
            copy()
        with simt.when(simt_peer.negated(reached) & share.thread.equals(0)):
            call.give_up(expected)

    def take_chunk(chunk):
        simt.barrier()  # all have read what the wait before said
        take(chunk, call.patience(), lambda: share.move(chunk))
        return []

    take(simt.word(0), patience, first_chunk)
    simt.loop(1, share.chunks(), 1, [], take_chunk)
