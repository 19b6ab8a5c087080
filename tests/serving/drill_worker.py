"""A real JAX worker that puts its first device out of step before call $DRILL_CALL; for tests of that fault alone."""

import os

from jmoe.serving import worker
from jmoe.serving.worker_jax import start_jax_runtime


class Drill:
    def __init__(self, init):
        self.inner, self.calls = start_jax_runtime(init), 0
        self.load, self.compile, self.collect = self.inner.load, self.inner.compile, self.inner.collect
        self.role = init["role"]

    def submit(self, key, inputs):
        self.calls += 1
        if self.calls == int(os.environ.get("DRILL_CALL", "3")) and self.role == "expert":
            self.inner.set_sequence(self.inner.cell.mesh.num_attention_devices, 12345)
        return self.inner.submit(key, inputs)


if __name__ == "__main__":
    worker.main(runtime_factory=Drill)
