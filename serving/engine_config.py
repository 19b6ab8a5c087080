"""EngineConfig: the bounds of an engine's queue and of its waits. No JAX."""

import dataclasses

from jmoe.cell_config import CellConfig


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine treats its queue and its time.

    Args:
      max_waiting: requests that may wait for a slot; one more is refused with QueueFullError.
      max_prefill_tokens: chunk budget: prompt tokens that one replica may compute between two decode calls while
        something could decode. A prefill call takes as long whatever is in it, and so counts as one chunk of every
        micro-batch; one call is always allowed. None is one call.
      max_calls_in_flight: calls that the device has before the oldest one's tokens are read; 1 shows the host between
        calls, 2 hides it, and a request admitted or ended meanwhile is heard of by the device one call later.
      check_interval_s: how often an idle engine asks the executor whether the cell still lives.
      close_timeout_s: how long `close` waits for the call in flight.

    Raises:
      ValueError: a value that is not positive.
    """

    max_waiting: int = 256
    max_prefill_tokens: int | None = None
    max_calls_in_flight: int = 2
    check_interval_s: float = 0.25
    close_timeout_s: float = 30.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None and not value > 0:
                raise ValueError(f"EngineConfig.{field.name}: expected more than 0, got {value}")

    def prefill_streak(self, cell: CellConfig) -> int:
        """Prefill calls in a row that max_prefill_tokens allows."""
        return max(1, (self.max_prefill_tokens or 0) // (cell.mesh.num_micro_batches * cell.chunk_len))
