"""How long each thing between a cell's parent and its workers may take. No JAX."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each thing may take, in seconds; what takes longer fails the cell.

    Attributes:
      start_s: from a worker's start to its handshake.
      init_s: joining jax.distributed and bringing devices up.
      load_s: reading a checkpoint.
      compile_s: one program.
      first_step_s: a program's first call, in which collectives connect to their peers; None is 50 more than step_s.
      step_s: one later call (a prefill chunk, or num_steps decode steps); None is 10 on GPUs and 120 on CPU, where a
        large model's honest call can pass 10. A worker that stops or dies is found by its silence, not by this.
      heartbeat_s: silence of a worker while idle or in a step.
      busy_heartbeat_s: silence while it starts, loads or compiles, which may hold Python's lock for long.
      stop_s: leaving after a stop command.
      grace_s: between SIGTERM and SIGKILL.
    """

    start_s: float = 60.0
    init_s: float = 120.0
    load_s: float = 1800.0
    compile_s: float = 900.0
    first_step_s: float | None = None
    step_s: float | None = None
    heartbeat_s: float = 7.0
    busy_heartbeat_s: float = 60.0
    stop_s: float = 2.0
    grace_s: float = 0.5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"Deadlines.{field.name}: expected more than 0 seconds, got {value}")
        if not min(self.heartbeat_s, self.busy_heartbeat_s) >= 2:  # a healthy worker's come once a second
            got = f"{self.heartbeat_s} and {self.busy_heartbeat_s}"
            raise ValueError(f"Deadlines: expected at least 2 seconds for heartbeat_s and busy_heartbeat_s, got {got}")

    def step_limit_s(self, platform: Literal["cpu", "gpu"], is_first: bool) -> float:
        """How long one call may take."""
        step_s = self.step_s or (10.0 if platform == "gpu" else 120.0)
        return (self.first_step_s or step_s + 50.0) if is_first else step_s
