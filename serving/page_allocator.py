"""PageAllocator: which KV pages of one attention replica are in use, and by how many. No JAX."""

import collections
from collections.abc import Iterable, Mapping

IDLE_PAGE = 0  # takes the writes of idle rows and is never read, so nobody gets it


class PageAllocator:
    """Reference-counted pages 1 to num_pages - 1, constant time a page.

    Freed pages are handed out again last in, first out: a stale page table then shows up in the tokens at once.

    Args:
      num_pages: pages of the pool, the idle page 0 included.

    Raises:
      ValueError: fewer than two pages.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"PageAllocator: expected at least 2 pages (page 0 is the idle page), got {num_pages}")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, IDLE_PAGE, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    def references(self, page: int) -> int:
        """How many holders a page has."""
        return self._references[page]

    def allocate(self, num: int) -> list[int] | None:
        """Takes `num` pages, each with one reference; None, and nothing taken, where fewer are free."""
        if num < 0:
            raise ValueError(f"PageAllocator.allocate: expected 0 pages or more, got {num}")
        if num > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds one reference to each page, all of which must be in use."""
        pages = list(pages)
        self._expect_used("share", dict.fromkeys(pages, 1))
        for page in pages:
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Takes one reference from each page; a page without any is free again."""
        pages = list(pages)
        self._expect_used("free", collections.Counter(pages))
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _expect_used(self, what: str, wanted: Mapping[int, int]) -> None:
        """Checked before anything changes, so that a refused call leaves the pool as it was."""
        for page, references in wanted.items():
            if not IDLE_PAGE < page < self.num_pages:
                raise ValueError(f"PageAllocator.{what}: expected pages 1 to {self.num_pages - 1}, got {page}")
            if self._references[page] < references:
                raise ValueError(
                    f"PageAllocator.{what}: expected page {page} to have at least {references} references, "
                    f"got {self._references[page]}"
                )

    def check_integrity(self) -> None:
        """Raises RuntimeError, with the numbers, unless every page is either free or referenced, once."""
        free = set(self._free)
        used = {page for page, count in enumerate(self._references) if count > 0}
        if len(free) != len(self._free):
            raise RuntimeError(f"page pool: {len(self._free) - len(free)} pages stand twice in the free list")
        if min(self._references) < 0 or IDLE_PAGE in free | used:
            raise RuntimeError(
                f"page pool: expected 0 references or more and none to the idle page, got {min(self._references)} at "
                f"least and {self._references[IDLE_PAGE]} to the idle page"
            )
        if free & used or len(free) + len(used) != self.num_pages - 1:
            raise RuntimeError(
                f"page pool: expected {self.num_pages - 1} pages, got {len(free)} free and {len(used)} used, "
                f"{len(free & used)} both"
            )
