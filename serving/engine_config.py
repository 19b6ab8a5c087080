"""EngineConfig: the bounds of an engine's queue and of its waits. No JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine treats its queue and its time.

    Args:
      max_waiting: requests that may wait for a slot; one more is refused with QueueFullError.
      max_prefill_streak: prefill calls in a row while something could decode.
      check_interval_s: how often an idle engine asks the executor whether the cell still lives.
      close_timeout_s: how long `close` waits for the call in flight.

    Raises:
      ValueError: a value that is not positive.
    """

    max_waiting: int = 256
    max_prefill_streak: int = 1
    check_interval_s: float = 0.25
    close_timeout_s: float = 30.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"EngineConfig.{field.name}: expected more than 0, got {value}")
