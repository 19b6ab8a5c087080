"""StopMatcher: finds stop strings in text that arrives in pieces. No JAX."""

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, and holds back what could still become one.

    Where several stop strings match, the one that begins first wins. At most one character less than the longest stop
    string is held back.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece; returns text that can be shown. After a match `found` is set and nothing follows."""
        if self.found or not self.stop:
            return "" if self.found else text
        self._held += text
        starts = [start for stop in self.stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        keep = self._num_undecided()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The text is over: returns what was held back."""
        shown, self._held = self._held, ""
        return shown

    def _num_undecided(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        for size in range(min(len(self._held), max(map(len, self.stop)) - 1), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self.stop):
                return size
        return 0
