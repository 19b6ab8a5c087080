"""The page allocator conserves pages whatever is asked of it."""

from collections import Counter

import hypothesis
import pytest
from hypothesis import strategies as st

from jmoe.serving.page_allocator import IDLE_PAGE, PageAllocator


def test_all_pages_but_the_idle_one_can_be_had_once():
    pool = PageAllocator(5)
    pages = pool.allocate(4)
    assert pages is not None and sorted(pages) == [1, 2, 3, 4]
    assert pool.num_free == 0 and pool.num_used == 4
    assert pool.allocate(1) is None and pool.allocate(0) == []


def test_a_refused_allocation_takes_nothing():
    pool = PageAllocator(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    pool.check_integrity()


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pool = PageAllocator(3)
    (page,) = pool.allocate(1) or []
    pool.share([page])
    pool.free([page])
    assert pool.num_used == 1 and pool.references(page) == 1
    pool.free([page])
    assert pool.num_used == 0
    pool.check_integrity()


def test_pages_freed_last_go_out_first():
    pool = PageAllocator(6)
    pages = pool.allocate(3) or []
    pool.free([pages[1]])
    assert pool.allocate(1) == [pages[1]]


@pytest.mark.parametrize("page", [0, -1, 4, 99])
def test_pages_outside_the_pool_are_refused(page):
    pool = PageAllocator(4)
    with pytest.raises(ValueError, match=f"expected pages 1 to 3, got {page}"):
        pool.free([page])


def test_a_refused_free_changes_nothing():
    pool = PageAllocator(5)
    pages = pool.allocate(2) or []
    for bad in ([*pages, 3], [pages[0], pages[0]]):
        with pytest.raises(ValueError, match="references, got"):
            pool.free(bad)
    assert pool.num_used == 2
    with pytest.raises(ValueError, match="references, got 0"):
        pool.share([3])
    pool.check_integrity()


def test_a_pool_needs_a_page_beside_the_idle_one():
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(1)
    with pytest.raises(ValueError, match="0 pages or more, got -1"):
        PageAllocator(2).allocate(-1)


def _lose(pool):
    pool._free.pop(0)


def _double(pool):
    pool._free.append(pool._free[0])


def _free_used(pool):
    pool._free.append(next(page for page in range(1, pool.num_pages) if pool.references(page)))


def _use_idle(pool):
    pool._references[IDLE_PAGE] = 1


def _negative(pool):
    pool._references[pool._free[0]] = -1


@pytest.mark.parametrize("damage", [_lose, _double, _free_used, _use_idle, _negative])
def test_check_integrity_sees_damage(damage):
    pool = PageAllocator(6)
    pool.allocate(2)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(RuntimeError, match="page pool: "):
        pool.check_integrity()


@hypothesis.given(
    num_pages=st.integers(2, 12),
    actions=st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 11)), max_size=60),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_pages_are_conserved_after_any_sequence(num_pages, actions):
    pool = PageAllocator(num_pages)
    held: Counter[int] = Counter()
    for what, number in actions:
        if what == "allocate":
            pages = pool.allocate(number)
            assert (pages is None) == (number > num_pages - 1 - len(held))
            assert not held.keys() & set(pages or [])
            held.update(pages or [])
        elif held:
            page = sorted(held)[number % len(held)]
            if what == "share":
                pool.share([page])
                held[page] += 1
            else:
                pool.free([page])
                held -= Counter([page])
        pool.check_integrity()
        assert pool.num_used == len(held) and all(pool.references(page) == count for page, count in held.items())
