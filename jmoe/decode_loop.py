"""The programs that run on the joint mesh: one prefill chunk, or K decode steps, for all micro-batches in one call."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmoe.cell_config import CellConfig
from jmoe.colocated import Colocated
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf
from jmoe.models.model import take_from
from jmoe.role_programs import AttentionRole, ExpertRole, Lane
from jmoe.rows import Rows
from jmoe.sampling import TokenCounts, sample, token_logprobs
from jmoe.schedule import build_schedule
from jmoe.sharding.exchange import Chain
from jmoe.sharding.shared_devices import SharedDevices
from jmoe.sharding.transports import exchange_of
from jmoe.step_inputs import StepLayout
from jmoe.walk import BothRoles, OneRole, Work, walk

Role = Literal["attention", "expert", "inline", "colocated"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What one step emits: tokens `[m, rows]` int32, -1 for none; the rest is None in greedy programs."""

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """What a device keeps from call to call; None where its role has none.

    Attributes:
      sequence: int32, the chain's next number.
      pages: keys and values by decoder layer.
      counts: by micro-batch; only programs that sample touch them.
      next_ids: `[m, rows]` int32, the token that each decode slot feeds next, -1 where it has ended. So a call can
        start before the host has seen the tokens of the one before.
      mailbox: `[words]` int32, where the peers' memory is (transport "push"): known at run time alone, so that a
        compiled program holds no address.
    """

    sequence: jax.Array
    pages: list[tuple[jax.Array, jax.Array]] | None = None
    counts: list[TokenCounts] | None = None
    next_ids: jax.Array | None = None
    mailbox: jax.Array | None = None


class CellProgram:
    """One program of a cell for one role: a pure function of this device's arrays, to be run under `shard_map`.

    Args:
      cell: sizes.
      kind: "prefill" (one chunk a micro-batch, one pass) or "decode" (num_steps passes).
      sampling: False compiles argmax only.
      role: the role that the program plays, "inline" for both under a conditional, or "colocated" for both on every
        device.
      push: of the transport "push": "pallas", "reference", or None for what this process's devices take.

    Raises:
      ValueError: "colocated" for a cell of two meshes, another role for a colocated one, or "inline" for roles apart.
    """

    def __init__(
        self,
        cell: CellConfig,
        kind: Literal["prefill", "decode"],
        sampling: bool,
        role: Role,
        push: Literal["pallas", "reference"] | None = None,
    ):
        self.cell = cell
        self.kind = kind
        self.sampling = sampling
        self.role = role
        self.layout = StepLayout.of(cell, kind)
        self.num_steps = cell.num_steps if kind == "decode" else 1
        model, mesh = cell.model, cell.mesh
        if (role == "colocated") != mesh.colocated:
            raise ValueError(f"CellProgram.role: expected 'colocated' if MeshConfig.colocated, got {role!r} for {mesh}")
        if mesh.colocated:
            self.devices = SharedDevices.of(mesh, model.hidden_size)
            return
        capacity = self.layout.num_rows * self.layout.num_tokens
        self.exchange = exchange_of(
            mesh, role, model.hidden_size, capacity, model.num_experts_per_tok, model.dtype, push
        )
        assert mesh.directions != "auto"
        self.schedule = build_schedule(len(model.moe_layers), mesh.num_micro_batches, mesh.directions)

    def __call__(
        self, attention: dict[str, Any], experts: dict[str, Any], state: DeviceState, inputs: jax.Array | None
    ):
        """Runs the call on one device.

        Args:
          attention, experts: this device's parameters by path; empty for the other role's.
          state: from the call before.
          inputs: `[m, rows, width]` int32 (see `StepInputs`); None on an expert device.

        Returns:
          (DeviceState, Emitted with a leading num_steps axis or None, fault `[2]` int32, dropped rows int32).
        """
        model = self.cell.model
        if self.role == "colocated":
            attention_role = AttentionRole(self.cell, AttentionHalf(model, take_from(attention)), None)
            expert_role = ExpertRole(self.cell, ExpertHalf(model, take_from(experts)), None)
            return self._steps(Colocated(attention_role, expert_role, self.devices), attention_role, state, inputs)
        attention_role = expert_role = None
        if self.role != "expert":
            attention_role = AttentionRole(self.cell, AttentionHalf(model, take_from(attention)), self.exchange)
        if self.role != "attention":
            expert_role = ExpertRole(self.cell, ExpertHalf(model, take_from(experts)), self.exchange)
        if attention_role is not None and expert_role is not None:
            cast = BothRoles(attention_role, expert_role)
        else:
            cast = OneRole(attention_role, expert_role)
        return self._steps(cast, attention_role, state, inputs)

    def _steps(self, cast, attention: AttentionRole | None, state: DeviceState, inputs: jax.Array | None):
        """The loop over steps; a single pass stands without one."""
        rows, counts, emitted, started = [], state.counts, None, []
        if attention is not None:
            assert inputs is not None and state.next_ids is not None
            rows = [Rows.unpack(packed, self.layout) for packed in inputs]
            if self.kind == "decode":
                started = [row.num_tokens > 0 for row in rows]
                rows = [row.resume(next_ids) for row, next_ids in zip(rows, state.next_ids, strict=True)]
            if self.sampling and self.kind == "prefill":
                counts = [c.with_chunk(*_chunk(r)) for c, r in zip(counts or [], rows, strict=True)]
            emitted = self._nothing()
        no_fault = jnp.full((2,), -1, jnp.int32)
        start = (rows, list(state.pages or []), counts, emitted, state.sequence, no_fault, jnp.int32(0))

        def step(k, carry):
            rows, pages, counts, emitted, sequence, fault, dropped = carry
            if isinstance(cast, Colocated):
                lanes, pages = cast.walk(rows, pages)
            else:
                lanes = [attention.empty_lane() for _ in rows] if attention is not None else []
                work = Work(lanes, rows, list(pages))
                chain = walk(self.schedule, cast, self.exchange, work, Chain.start(sequence, mailbox=state.mailbox))
                fault = jnp.where(fault[0] < 0, chain.fault(), fault)
                lanes, rows, pages, sequence = work.lanes, work.rows, work.pages, chain.sequence
            if attention is not None:
                rows, counts, now = self._sample_all(cast, attention, lanes, rows, counts)
                emitted = jax.tree.map(lambda whole, part: whole.at[k].set(part), emitted, now)
                dropped = dropped + sum(lane.routes.num_dropped for lane in lanes if lane.routes is not None)
            return rows, pages, counts, emitted, sequence, fault, dropped

        if self.num_steps == 1:
            carry = step(0, start)
        else:
            carry = jax.lax.fori_loop(0, self.num_steps, step, start)
        after, pages, counts, emitted, sequence, fault, dropped = carry
        if attention is None:
            return DeviceState(sequence, counts=counts, mailbox=state.mailbox), emitted, fault, dropped
        assert emitted is not None and state.next_ids is not None
        if self.kind == "decode":
            next_ids = [r.next_ids(*old) for r, *old in zip(after, state.next_ids, started, strict=True)]
        else:
            next_ids = [
                r.first_ids(old, ids) for r, old, ids in zip(rows, state.next_ids, emitted.tokens[0], strict=True)
            ]
        kept = DeviceState(sequence, pages, counts, jnp.stack(next_ids), state.mailbox)
        return kept, emitted, fault, dropped

    def _nothing(self) -> Emitted:
        shape = (self.num_steps, self.cell.mesh.num_micro_batches, self.layout.num_rows)
        tokens = jnp.full(shape, -1, jnp.int32)
        if not self.sampling:
            return Emitted(tokens)
        top = (*shape, self.cell.num_top_logprobs)
        return Emitted(tokens, jnp.zeros(shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))

    def _sample_all(self, cast, attention: AttentionRole, lanes: list[Lane], rows: list[Rows], counts):
        """The next token of every micro-batch, and the rows moved on to it."""
        new_rows, new_counts, emitted = [], [], []
        for i, (lane, row) in enumerate(zip(lanes, rows, strict=True)):
            count = counts[i] if self.sampling else None

            def head(lane, row, count):
                return self._sample_one(attention, lane, row, count)

            if isinstance(cast, BothRoles):
                shapes = jax.eval_shape(head, lane, row, count)

                def idle(lane, row, count, shapes=shapes):
                    del lane
                    return row, count, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[2])

                row, count, now = jax.lax.cond(cast.is_attention(), head, idle, lane, row, count)
            else:
                row, count, now = head(lane, row, count)
            new_rows.append(row)
            new_counts.append(count)
            emitted.append(now)
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *emitted)
        return new_rows, new_counts if self.sampling else counts, stacked

    def _sample_one(self, attention: AttentionRole, lane: Lane, row: Rows, count: TokenCounts | None):
        """(rows of the next step, counts, Emitted `[rows]`) of one micro-batch."""
        x = attention.last_hidden(lane, row)
        if count is None:
            token_ids = attention.greedy_tokens(x)
            return self._next(row, token_ids), None, Emitted(jnp.where(row.emits, token_ids, -1))
        logits = attention.half.logits(x, attention.tensor)
        token_ids = sample(logits, count.at_slots(row.slot), row.sampling, row.num_output)
        details = token_logprobs(logits, token_ids, self.cell.num_top_logprobs)
        count = count.with_token(token_ids, row.emits, row.slot)
        return self._next(row, token_ids), count, Emitted(jnp.where(row.emits, token_ids, -1), *details)

    def _next(self, row: Rows, token_ids: jax.Array) -> Rows:
        """A prefill call has no next step."""
        return row.advance(token_ids) if self.kind == "decode" else row


def _chunk(row: Rows):
    return row.token_ids, row.positions, row.valid, row.num_prompt, row.slot, row.reset
