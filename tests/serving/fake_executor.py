"""A numpy cell for tests: its next token is a hash of all tokens before, read back through the page table.

A wrong page table, position, slot, reset, penalty count, seed or preemption changes the tokens, or trips a check.
"""

import threading
from collections import Counter, deque

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.serving.executors.protocol import ProgramKey
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import OWN_TOKEN, StepInputs, StepOutputs

EOS = 3
PARAM_COLUMNS = (
    "top_k", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip


def make_cell(attention=1, micro_batches=2, vocab_size=101, **sizes) -> CellConfig:
    """A small cell; only its sizes matter here."""
    model = ModelConfig(
        family="mixtral", vocab_size=vocab_size, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
        num_experts=2, num_experts_per_tok=1, expert_ffn_size=8, eos_token_ids=(EOS,),
    )  # fmt: skip
    mesh = MeshConfig(attention=attention, num_micro_batches=micro_batches).resolve(2)
    sizes = {"rows": 2, "chunk_len": 8, "num_steps": 4, "page_len": 4, "num_pages": 33, "max_len": 64} | sizes
    return CellConfig(model=model, mesh=mesh, **sizes)


def hash_token(sequence, num_prompt, column, vocab_size) -> int:
    """The fake model: what follows `sequence`, given the request's packed parameters."""
    value = 17
    for position, token in enumerate(sequence):
        value = (value * 1_000_003 + (position + 1) * 7_919 + token) % (2**61 - 1)
    if column("temperature") > 0:
        params = [round(float(column(name)) * 1000) for name in PARAM_COLUMNS]
        for part in (int(column("seed")), len(sequence) - num_prompt, *params):
            value = (value * 1_000_033 + part) % (2**61 - 1)
    return value % vocab_size


def expected_tokens(prompt, params, cell, seed=0) -> list[int]:
    """What a lone request must get: the hash applied token by token, without pages or calls."""

    def column(name):
        return seed if name == "seed" else getattr(params, name)

    stop_ids = (*(() if params.ignore_eos else (EOS,)), *params.stop_token_ids)
    output: list[int] = []
    while len(output) < min(params.max_tokens, cell.max_len - len(prompt)):
        output.append(hash_token([*prompt, *output], len(prompt), column, cell.model.vocab_size))
        if output[-1] in stop_ids:
            break
    return output


class FakeExecutor:
    """Runs StepInputs on simulated pages.

    Args:
      cell: sizes.
      fail_at: number of the call (from 0) that raises `error` after it has written its pages.
      error: what it raises.
      gate: where given, every call announces itself in `entered` and waits for the gate to be set, 10 s at most.
    """

    def __init__(self, cell: CellConfig, fail_at=None, error=None, gate: threading.Event | None = None):
        self.cell = cell
        self.calls: list[tuple[ProgramKey, int]] = []  # key, rows at work
        self.num_checks = 0
        self.closed = False
        self.check_error: Exception | None = None
        self.gate = gate
        self.entered = threading.Event()
        self._fail_at, self._error = fail_at, error
        shape = (cell.mesh.attention, cell.num_pages, cell.page_len)
        self._tokens = np.full(shape, -1, np.int64)
        self._positions = np.full(shape, -1, np.int64)
        self._outputs: dict[tuple[int, int, int], Counter] = {}  # penalty counts of each slot
        self._seen: dict[tuple[int, int, int], Counter] = {}
        self._next: dict[tuple[int, int, int], int | None] = {}  # what each slot feeds next; None where it has ended
        self.in_flight: deque[tuple[ProgramKey, StepInputs]] = deque()
        self.most_in_flight = 0

    def compile(self, keys, progress):
        for key in keys:
            progress(str(key))

    def check(self):
        self.num_checks += 1
        if self.check_error is not None:
            raise self.check_error

    def close(self):
        self.closed = True

    def submit(self, key: ProgramKey, inputs: StepInputs) -> None:
        """Nothing is computed before `collect`: later calls are planned without its tokens, as on a device."""
        self.in_flight.append((key, inputs))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

    def collect(self) -> StepOutputs:
        self._wait_for_gate()
        return self.run(*self.in_flight.popleft())

    def run(self, key: ProgramKey, inputs: StepInputs) -> StepOutputs:
        num_steps = self.cell.num_steps if key.kind == "decode" else 1
        shape = (num_steps, *inputs["num_tokens"].shape)
        tokens = np.full(shape, -1, np.int32)
        places = [tuple(map(int, place)) for place in np.argwhere(inputs["num_tokens"] > 0)]
        assert places, "a call without work"
        if key.kind == "decode":
            places = self._resume(inputs, places)
        self._check_pages(key, inputs, places)
        for place in places:
            self._run_row(key, inputs, place, tokens[(slice(None), *place)])
        self.calls.append((key, len(places)))
        if self._fail_at is not None and len(self.calls) - 1 == self._fail_at:
            raise self._error
        if not key.sampling:
            return StepOutputs(tokens)
        top = np.arange(self.cell.num_top_logprobs, dtype=np.int32)
        return StepOutputs(
            tokens, -tokens.astype(np.float32), tokens[..., None] + top, -(tokens[..., None] + top).astype(np.float32)
        )

    def _wait_for_gate(self):
        if self.gate is not None:
            self.entered.set()
            assert self.gate.wait(10), "the test never opened the gate"

    def _resume(self, inputs, places):
        """Each row's own token, as left by the call before; rows that have ended idle, whatever the host thinks."""
        for place in places:
            assert inputs["token_ids"][place].tolist() == [OWN_TOKEN]
            inputs["token_ids"][place] = self._next[place] if self._next[place] is not None else 0
        return [place for place in places if self._next[place] is not None]

    def _check_pages(self, key, inputs, places):
        """Idle rows hold nothing, live rows have real pages for all they read and write, and nobody shares one."""
        idle = inputs["num_tokens"] == 0
        assert not inputs["page_table"][idle].any(), "an idle row with pages"
        assert (inputs["num_tokens"] <= inputs.layout.num_tokens).all()
        owners: dict[tuple[int, int], tuple] = {}
        for place in places:
            steps = 1
            if key.kind == "decode":
                assert inputs["slot"][place] == place[2]
                steps = min(self.cell.num_steps, int(inputs["remaining"][place]))
            end = int(inputs["start_pos"][place] + inputs["num_tokens"][place]) + steps - 1
            assert 1 <= inputs["remaining"][place] <= self.cell.max_len - inputs["num_prompt"][place]
            assert end <= self.cell.max_len, f"{end} positions of {self.cell.max_len}"
            pages = inputs["page_table"][place][: -(-end // self.cell.page_len)].tolist()
            assert all(1 <= page < self.cell.num_pages for page in pages), f"{place}: {end} positions in {pages}"
            for page in pages:
                other = owners.setdefault((place[0], page), place)
                assert other == place, f"page {page} of replica {place[0]} written by {other} and {place}"

    def _run_row(self, key, inputs, place, tokens):
        """Feeds one row's tokens, then samples up to len(tokens) tokens into it."""
        slot = (place[0], place[1], int(inputs["slot"][place]))
        num_prompt = int(inputs["num_prompt"][place])
        fed = inputs["token_ids"][place][: inputs["num_tokens"][place]].tolist()
        if inputs["reset"][place]:
            self._seen[slot], self._outputs[slot] = Counter(), Counter()
        assert key.sampling or not self._needs_sampling(inputs, place), "the greedy program can't"
        position = int(inputs["start_pos"][place])
        for token in fed:
            self._write(inputs, place, position, token)
            position += 1
        if key.sampling and key.kind == "prefill":
            self._count(slot, fed, position - len(fed), num_prompt)
        remaining = int(inputs["remaining"][place])
        stop_ids = [token for token in inputs["stop_ids"][place].tolist() if token >= 0]
        if not inputs["sample"][place]:
            return
        for step in range(len(tokens)):
            sequence = self._read(inputs, place, position)
            if self._needs_sampling(inputs, place):
                self._check_counts(slot, sequence, num_prompt)
            token = hash_token(sequence, num_prompt, lambda name: inputs[name][place], self.cell.model.vocab_size)
            tokens[step] = token
            if key.sampling:
                self._count(slot, [token], position, num_prompt)
            remaining -= 1
            self._next[slot] = None if token in stop_ids or remaining == 0 else token
            if self._next[slot] is None:
                return
            if step + 1 < len(tokens):
                self._write(inputs, place, position, token)
                position += 1

    def _needs_sampling(self, inputs, place):
        """A request that needs it takes the sampling programs for all its calls; others may come by on the way."""
        neutral = {"repetition_penalty": 1.0, "temperature": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        return any(inputs[name][place] != value for name, value in neutral.items())

    def _write(self, inputs, place, position, token):
        page = inputs["page_table"][place][position // self.cell.page_len]
        self._tokens[place[0], page, position % self.cell.page_len] = token
        self._positions[place[0], page, position % self.cell.page_len] = position

    def _read(self, inputs, place, num_positions):
        """The sequence, through the page table; every position must be where it was written."""
        pages = inputs["page_table"][place]
        positions = self._positions[place[0], pages].reshape(-1)[:num_positions]
        assert (positions == np.arange(num_positions)).all(), f"{place}: pages {pages} hold positions {positions}"
        return self._tokens[place[0], pages].reshape(-1)[:num_positions].tolist()

    def _count(self, slot, tokens, position, num_prompt):
        for i, token in enumerate(tokens):
            counts = self._outputs if position + i >= num_prompt else self._seen
            counts[slot][token] += 1

    def _check_counts(self, slot, sequence, num_prompt):
        """Where a slot is sampled, its penalty counts are those of this sequence and no other."""
        assert slot in self._seen, f"slot {slot} was never reset"
        assert self._seen[slot] == Counter(sequence[:num_prompt])
        assert self._outputs[slot] == Counter(sequence[num_prompt:])
