"""KeptPrograms: each function compiles once a shape and a device, is found on disk after that, and says what it is."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import kept_programs
from jmoe.kept_programs import KeptPrograms
from jmoe.program_files import ProgramFiles

DEVICES = jax.devices()[:2]


def scaled(factor, array):
    return array * factor


def ones(shape, dtype):
    return jnp.ones(shape, dtype)


@pytest.fixture
def compiled(monkeypatch):
    """Names of programs that were compiled and kept."""
    names, save = [], kept_programs.save_program
    monkeypatch.setattr(kept_programs, "save_program", lambda f, name, p: (names.append(name), save(f, name, p)))
    return names


def test_a_second_start_compiles_nothing(tmp_path, compiled, monkeypatch):
    array = jax.device_put(np.arange(6.0).reshape(2, 3), DEVICES[1])
    for _ in range(2):
        programs = KeptPrograms(DEVICES, ProgramFiles(tmp_path))
        twice = programs.call(scaled, (2,), DEVICES[1], array)
        np.testing.assert_array_equal(twice, 2 * np.asarray(array))
        filled = programs.call(ones, ((3, 1), "int32"), DEVICES[0])
        np.testing.assert_array_equal(filled, np.ones((3, 1)))
        assert twice.devices() == {DEVICES[1]} and filled.devices() == {DEVICES[0]} and filled.dtype == np.int32
        assert len(set(compiled)) == len(compiled) == 2
        monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("compiled again"))


def test_what_a_program_depends_on_is_in_its_name(tmp_path, compiled):
    programs, array = KeptPrograms(DEVICES, ProgramFiles(tmp_path)), np.arange(6.0, dtype=np.float32)
    for function, static, device, argument in (
        (scaled, (2,), 0, array),
        (scaled, (3,), 0, array),
        (scaled, (2,), 1, array),
        (scaled, (2,), 0, array[:3]),
        (scaled, (2,), 0, array.astype(np.int32)),
        (jnp.full_like, (), 0, array[:1]),
    ):
        given = jax.device_put(argument, DEVICES[device])
        programs.call(function, static, DEVICES[device], *([given] if function is scaled else [given, given[0]]))
    assert len(set(compiled)) == len(compiled) == 6


def test_threads_that_want_the_same_program_compile_it_once(tmp_path, compiled):
    programs, together = KeptPrograms(DEVICES, ProgramFiles(tmp_path)), threading.Barrier(4)

    def call(_):
        together.wait(30)
        return float(programs.call(scaled, (5,), DEVICES[0], jax.device_put(np.float32(1), DEVICES[0])))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [5.0] * 4
    assert len(compiled) == 1


def test_what_does_not_compile_says_why_each_time(tmp_path):
    programs = KeptPrograms(DEVICES, ProgramFiles(tmp_path))
    for _ in range(2):
        with pytest.raises(TypeError, match="not_a_type"):
            programs.call(ones, ((1,), "not_a_type"), DEVICES[0])
