"""How a thread block of the prefill kernel hands the state of a cut item on to another, warpgroup by warpgroup."""

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.simt import Pointer

FLAG_WORDS = 4


def hand_on(flag: Pointer) -> None:
    """Once this warpgroup has stored its state."""
    simt.barrier()
    with simt.when((simt.thread() % simt.BLOCK_THREADS).equals(0)):
        simt_marks.mark(flag)


def take_over(flag: Pointer) -> None:
    """Waits for the state; the flag is the next call's again."""
    with simt.when((simt.thread() % simt.BLOCK_THREADS).equals(0)):
        simt_marks.wait(flag)
        simt_marks.wipe(flag)
    simt.barrier()
