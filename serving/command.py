"""Command: what a cell's parent has asked all workers for, until all have answered. No JAX."""

import collections
import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True, eq=False)
class Command:
    """A command in flight. Its deadline begins when the commands before it are answered: workers follow in order."""

    number: int
    kind: str
    limit_s: float
    deadline: float | None = None
    replies: dict[int, Any] = dataclasses.field(default_factory=dict)
    done: bool = False
    progress: collections.deque[str] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=1000))
