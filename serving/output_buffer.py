"""OutputBuffer: from the engine's thread to one client's coroutine, with a bound on the client's lag. No JAX."""

import asyncio
import collections
from collections.abc import Callable

from jmoe.serving.requests import RequestOutput


class Wakeups:
    """Sets events of one loop from another thread, all of a call's by one wake-up.

    A wake-up is a system call, in which the other thread takes Python's lock: with one for each of 128 outputs the
    engine lost 5 % of its time (27.6 ms a call, two cores).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._events: collections.deque[asyncio.Event] = collections.deque()
        self._is_woken = False

    def set(self, event: asyncio.Event) -> None:
        """Sets an event soon, from any thread."""
        self._events.append(event)
        if not self._is_woken and not self._loop.is_closed():
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        self._is_woken = False  # first: whoever appends from here on wakes the loop again
        while self._events:
            self._events.popleft().set()


class OutputBuffer:
    """Outputs of one request that its client has not taken yet.

    Args:
      wakeups: of the loop of the coroutine that takes.
      max_outputs: how many may wait; one more aborts the request.
      abort: ends the request; called in either thread.
    """

    def __init__(self, wakeups: Wakeups, max_outputs: int, abort: Callable[[], object]):
        self.overflowed = False
        self._wakeups = wakeups
        self._max_outputs = max_outputs
        self._abort = abort
        self._outputs: collections.deque[RequestOutput] = collections.deque()
        self._event = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Takes an output, in the engine's thread."""
        if self.overflowed:
            return
        if len(self._outputs) >= self._max_outputs and output.finish_reason is None:
            self.give_up()
        else:
            self._outputs.append(output)
        self._wakeups.set(self._event)

    def give_up(self) -> None:
        """Aborts the request: the client is too far behind, and gets no more of it."""
        self.overflowed = True
        self._abort()

    async def take(self, timeout_s: float) -> list[RequestOutput]:
        """All that has come since the last call; waits for the first. Empty after an overflow.

        Raises:
          TimeoutError: nothing came in time.
        """
        async with asyncio.timeout(timeout_s):
            while not self._outputs and not self.overflowed:
                self._event.clear()  # a put in another thread sets it from this loop, so after this line
                await self._event.wait()
        if self.overflowed:
            return []
        return [self._outputs.popleft() for _ in range(len(self._outputs))]  # those that come meanwhile wait
