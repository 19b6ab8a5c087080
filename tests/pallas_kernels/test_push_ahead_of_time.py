"""The push compiled for a Hopper GPU that isn't there: one launch an exchange, and room for all its blocks at once."""

import re

import jax
import jax.numpy as jnp
import pytest
from imaginary_gpus import imaginary_gpus

from jmoe.pallas_kernels.push import push
from jmoe.pallas_kernels.push_plan import MAX_BLOCKS, MailboxMap, Message, PushPlan

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def device():
    return jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])


@pytest.mark.parametrize(
    ("rounds", "capacity", "width", "dtype", "gathers"),
    [(1, 512, 2048, jnp.bfloat16, True), (8, 16, 144, jnp.float8_e4m3fn, False), (3, 100, 1096, jnp.float32, False)],
)
@pytest.mark.parametrize("attention", [True, False])
def test_an_exchange_is_one_kernel(device, rounds, capacity, width, dtype, gathers, attention):
    mailbox, k = MailboxMap(rounds, 4), 2
    dispatch, combine = Message(capacity, width, dtype, (k, k, 1)), Message(capacity, width, dtype)
    plan = PushPlan(mailbox, *((dispatch, combine) if attention else (combine, dispatch)))

    def run(table, sequence, rows, counts, columns, index):
        index = index if gathers and attention else None
        return push(plan, table, sequence, rows, counts, columns, index, implementation="pallas")

    def shape(*sizes, of=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, of, sharding=device)

    columns = tuple(shape(rounds, capacity, words) for words in (k, k, 1)) if attention else ()
    rows = shape(2 * capacity, width, of=dtype) if gathers and attention else shape(rounds, capacity, width, of=dtype)
    given = (shape(mailbox.table_words), shape(), rows, shape(rounds), columns, shape(rounds, capacity))
    text = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert len(re.findall(r"custom_call_target=\"mosaic_gpu", entry)) == 1
    assert not re.findall(r" (fusion|sort|copy|call)\(", entry)
    # Senders wait for receivers of the other device alone if every block of a kernel has a place at once: two blocks of
    # 128 threads on each of 132 multiprocessors.
    assert 2 * rounds * dispatch.blocks(rounds) <= 2 * MAX_BLOCKS <= 2 * 132
