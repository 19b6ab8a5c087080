"""The ping-pong schedule as data: what each role computes in each tick, and what the exchange carries. No JAX.

Three readers use it and none has a copy: the program builder (`jmoe.walk`), the planner's simulator, which
puts times on it, and the timeline plot, which draws it.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One unit of work: a layer of one micro-batch. An attention stage with layer == num_layers is the head."""

    layer: int
    micro_batch: int


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange between the meshes: the stage whose rows go out to the experts, and the one whose come back."""

    dispatch: Stage | None = None
    combine: Stage | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """What starts in one tick, all at once: an attention stage, an expert stage, an exchange (any may be None).

    A stage that starts in tick t reads what exchanges brought in ticks before t. An exchange in tick t carries what
    stages that started in tick t - compute_ticks or before have made.
    """

    attention: Stage | None = None
    expert: Stage | None = None
    exchange: Exchange | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """The ticks of one pass over all layers and micro-batches, in the order in which both roles walk them.

    Attributes:
      num_layers: MoE layers, L. Attention runs stages 0..L for each micro-batch (L is the head), experts 0..L-1.
      num_micro_batches: m.
      directions: "both": an exchange may carry a dispatch and a combine, and a stage lasts one tick (lockstep).
        "one": an exchange carries one of them, and a stage lasts two ticks, one exchange in each. "separate": the
        stages and messages of "one", but the roles call no exchange together: see `ticks_of`.
      ticks: the ticks in which anything starts.
    """

    num_layers: int
    num_micro_batches: int
    directions: Literal["one", "both", "separate"]
    ticks: tuple[Tick, ...]

    @property
    def compute_ticks(self) -> int:
        """How many ticks one stage spans."""
        return 1 if self.directions == "both" else 2

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The chain: every exchange in the order in which both roles call them."""
        return tuple(t.exchange for t in self.ticks if t.exchange is not None)

    def ticks_of(self, role: Literal["attention", "expert"]) -> tuple[Tick, ...]:
        """What one role walks: its stages in order, and the exchanges that it calls.

        With "separate" an exchange stands before each stage: it sends what the stage before has made and waits for what
        this one reads, whatever the other role calls meanwhile. Messages of one direction keep their order, and m of
        them at most are under way: a role sends its n-th after it has used the (n - m)-th of the other direction.
        """
        if self.directions != "separate":
            return self.ticks
        stages = [s for t in self.ticks if (s := t.attention if role == "attention" else t.expert) is not None]
        made: list[Stage | None] = [None, *(s if s.layer < self.num_layers else None for s in stages)]
        if role == "attention":
            needed = [Stage(s.layer - 1, s.micro_batch) if s.layer else None for s in stages]
            calls = [_exchange(out, back) for out, back in zip(made, [*needed, None], strict=True)]
            ticks = [Tick(attention=s, exchange=call) for s, call in zip([*stages, None], calls, strict=True)]
        else:
            calls = [_exchange(out, back) for out, back in zip([*stages, None], made, strict=True)]
            ticks = [Tick(expert=s, exchange=call) for s, call in zip([*stages, None], calls, strict=True)]
        return tuple(tick for tick in ticks if tick != Tick())


def _exchange(dispatch: Stage | None, combine: Stage | None) -> Exchange | None:
    return Exchange(dispatch, combine) if dispatch or combine else None


def build_schedule(num_layers: int, num_micro_batches: int, directions: Literal["one", "both", "separate"]) -> Schedule:
    """Builds the ping-pong order for any number of layers and micro-batches.

    With c ticks to a stage and one to an exchange, attention of (layer l, micro-batch i) starts in tick
    c * (l * period + i), its dispatch c later, its experts 1 after that, its combine c later, and the next layer 1
    after that: a round trip of 2c + 2 ticks. The period is max(m, ceil((2c + 2) / c)) stages, that is max(m, 4) in
    lockstep and max(m, 3) with one direction an exchange: from there on no lane waits in steady state. In the second
    case dispatches fall on even ticks and combines on odd ones (D0 D1 C0 D2 C1 D0' C2 ...).

    Args:
      num_layers: MoE layers, L >= 1.
      num_micro_batches: m >= 1.
      directions: "both" for lockstep, "one" for one direction an exchange, "separate" for roles that call alone.

    Returns:
      The schedule; ticks in which nothing starts are left out.

    Raises:
      ValueError: a count below 1 or an unknown `directions`.

    Source: MegaScale-Infer (arXiv 2504.02263), section 4.1; the lockstep form is this project's.
    """
    if num_layers < 1 or num_micro_batches < 1:
        raise ValueError(
            f"build_schedule: expected num_layers and num_micro_batches of at least 1, "
            f"got {num_layers} and {num_micro_batches}"
        )
    if directions not in ("one", "both", "separate"):
        raise ValueError(f"build_schedule: expected directions 'one', 'both' or 'separate', got {directions!r}")
    span = 1 if directions == "both" else 2
    period = max(num_micro_batches, 4 if directions == "both" else 3)
    attention: dict[int, Stage] = {}
    expert: dict[int, Stage] = {}
    dispatch: dict[int, Stage] = {}
    combine: dict[int, Stage] = {}
    for layer in range(num_layers + 1):
        for micro_batch in range(num_micro_batches):
            stage = Stage(layer, micro_batch)
            start = span * (layer * period + micro_batch)
            attention[start] = stage
            if layer < num_layers:
                dispatch[start + span] = stage
                expert[start + span + 1] = stage
                combine[start + 2 * span + 1] = stage
    last = max(attention)
    ticks = []
    for t in range(last + 1):
        exchange = Exchange(dispatch.get(t), combine.get(t)) if t in dispatch or t in combine else None
        tick = Tick(attention.get(t), expert.get(t), exchange)
        if tick != Tick():
            ticks.append(tick)
    return Schedule(num_layers, num_micro_batches, directions, tuple(ticks))
