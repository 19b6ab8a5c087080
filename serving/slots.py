"""Slots: which request sits where in the decode batch, and which KV pages it holds. No JAX.

A lane is one (replica, micro-batch) pair. Each replica has its own pool of pages, shared by its lanes.
"""

from jmoe.cell_config import CellConfig
from jmoe.serving.page_allocator import PageAllocator
from jmoe.serving.requests import Request, Slot

Lane = tuple[int, int]


class Slots:
    """The slots and page pools of one cell."""

    def __init__(self, cell: CellConfig):
        self.cell = cell
        self.allocators = [PageAllocator(cell.num_pages) for _ in range(cell.mesh.attention)]
        self.lanes: dict[Lane, dict[int, Request]] = {
            (replica, micro_batch): {}
            for replica in range(cell.mesh.attention)
            for micro_batch in range(cell.mesh.num_micro_batches)
        }
        self._free_rows = {lane: list(range(cell.rows - 1, -1, -1)) for lane in self.lanes}
        self.num_bound = [0] * cell.mesh.attention  # requests of each replica

    def num_pages_for(self, num_positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-num_positions // self.cell.page_len)

    def best_lane(self, num_positions: int) -> Lane | None:
        """The emptiest lane with a free row, in a replica whose pool has room for a request of that length.

        Beside the request's own pages, room for one decode call of every request already in that replica must stay:
        else a newcomer is admitted only to be preempted by the next call. An empty replica needs no such reserve, so
        whatever fits alone is admitted in the end.
        """
        reserve = self.num_pages_for(self.cell.num_steps)
        best: tuple[int, int, int, Lane] | None = None
        for lane, rows in self._free_rows.items():
            replica = lane[0]
            num_free = self.allocators[replica].num_free
            if rows and num_free >= self.num_pages_for(num_positions) + reserve * self.num_bound[replica]:
                candidate = (len(self.lanes[lane]), self.num_bound[replica], -num_free, lane)
                if best is None or candidate < best:
                    best = candidate
        return best[-1] if best else None

    def bind(self, request: Request, lane: Lane) -> None:
        """Gives a request a row of a lane that has one."""
        row = self._free_rows[lane].pop()
        self.lanes[lane][row] = request
        self.num_bound[lane[0]] += 1
        request.slot = Slot(*lane, row)

    def grow(self, request: Request, num_positions: int) -> bool:
        """Takes the pages that a bound request lacks for so many positions; False, none taken, if too few are free."""
        assert request.slot is not None
        missing = self.num_pages_for(num_positions) - len(request.page_ids)
        if missing <= 0:
            return True
        pages = self.allocators[request.slot.replica].allocate(missing)
        if pages is None:
            return False
        request.page_ids.extend(pages)
        return True

    def release(self, request: Request) -> None:
        """Frees the slot and the pages of a bound request."""
        assert request.slot is not None
        replica, micro_batch, row = request.slot
        self.allocators[replica].free(request.page_ids)
        del self.lanes[replica, micro_batch][row]
        self._free_rows[replica, micro_batch].append(row)
        self.num_bound[replica] -= 1
        request.page_ids = []
        request.slot = None

    def check_integrity(self) -> None:
        """Raises RuntimeError, with the numbers, unless slots, pages and references agree with one another."""
        held: list[list[int]] = [[] for _ in self.allocators]
        for lane, requests in self.lanes.items():
            rows = sorted([*requests, *self._free_rows[lane]])
            if rows != list(range(self.cell.rows)):
                raise RuntimeError(f"lane {lane}: expected rows 0 to {self.cell.rows - 1} once each, got {rows}")
            for row, request in requests.items():
                if request.slot != Slot(*lane, row):
                    raise RuntimeError(f"request {request.id}: expected slot {Slot(*lane, row)}, got {request.slot}")
                if request.num_computed > len(request.page_ids) * self.cell.page_len:
                    raise RuntimeError(
                        f"request {request.id}: {request.num_computed} positions in {len(request.page_ids)} pages "
                        f"of {self.cell.page_len}"
                    )
                held[lane[0]] += request.page_ids
        for replica, (allocator, pages) in enumerate(zip(self.allocators, held, strict=True)):
            allocator.check_integrity()
            references = sum(allocator.references(page) for page in set(pages))
            if len(pages) != references or allocator.num_used != len(set(pages)):
                raise RuntimeError(
                    f"replica {replica}: requests hold {len(pages)} pages ({len(set(pages))} different), the pool "
                    f"counts {references} references to them and {allocator.num_used} pages in use"
                )
