"""ProcessOptions: how the worker processes of a cell are placed, reached, timed and logged. No JAX."""

import dataclasses
import os
import pathlib
import secrets
from typing import Literal

from jmoe.serving.deadlines import Deadlines
from jmoe.serving.wire import MIN_TOKEN_LEN
from jmoe.serving.worker_process import DEFAULT_COMMAND
from jmoe.serving.worker_start import TOKEN_VARIABLE, WorkerStart, split_address


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessOptions:
    """How the workers of the executor `processes` are placed, reached, timed and logged.

    Attributes:
      per: one worker per "role" or per "device".
      addresses: HOST:PORT of workers that listen (`--listen`), attention first; empty for children of this process.
        They follow one another on the joint axis; on a host with several, each takes the next GPUs.
      token: the secret that listening workers share; None for the environment's JMOE_WORKER_TOKEN, or for a fresh one
        with children.
      deadlines: how long each thing may take.
      log_dir: keeps each child's output there.
      command: what starts a child.

    Raises:
      ValueError: an unknown `per`, or an address that is none.
    """

    per: Literal["role", "device"] = "role"
    addresses: tuple[str, ...] = ()
    token: str | None = dataclasses.field(default=None, repr=False)
    deadlines: Deadlines = dataclasses.field(default_factory=Deadlines)
    log_dir: str | os.PathLike[str] | None = None
    command: tuple[str, ...] = DEFAULT_COMMAND

    def __post_init__(self):
        if self.per not in ("role", "device"):
            raise ValueError(f"processes_per: expected 'role' or 'device', got {self.per!r}")
        for address in self.addresses:
            split_address(address)

    def start(self) -> WorkerStart:
        """What brings the workers up, with the token that they share; ValueError without a token for listening ones."""
        token = self.token or (os.environ.get(TOKEN_VARIABLE, "") if self.addresses else secrets.token_hex(32))
        if len(token) < MIN_TOKEN_LEN:
            raise ValueError(
                f"worker token: expected at least {MIN_TOKEN_LEN} characters, given or in ${TOKEN_VARIABLE}, for "
                f"workers at addresses, got {len(token)}"
            )
        return WorkerStart(token, self.command, pathlib.Path(self.log_dir) if self.log_dir else None)
