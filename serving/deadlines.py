"""How long each thing between a cell's parent and its workers may take. No JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each thing may take, in seconds; what takes longer fails the cell.

    Attributes:
      start_s: from a worker's start to its handshake.
      init_s: joining jax.distributed and bringing devices up.
      load_s: reading a checkpoint.
      compile_s: one program.
      first_step_s: a program's first call, in which collectives connect to their peers.
      step_s: one later call (a prefill chunk, or num_steps decode steps).
      heartbeat_s: silence of a worker while idle or in a step.
      busy_heartbeat_s: silence while it starts, loads or compiles, which may hold Python's lock for long.
      stop_s: leaving after a stop command.
      grace_s: between SIGTERM and SIGKILL.
    """

    start_s: float = 60.0
    init_s: float = 120.0
    load_s: float = 1800.0
    compile_s: float = 900.0
    first_step_s: float = 60.0
    step_s: float = 10.0
    heartbeat_s: float = 7.0
    busy_heartbeat_s: float = 60.0
    stop_s: float = 2.0
    grace_s: float = 0.5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) <= 0:
                raise ValueError(f"Deadlines.{field.name}: expected more than 0 seconds, got {value}")
