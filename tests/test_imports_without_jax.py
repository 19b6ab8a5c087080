"""The planner, the scheduler, the engine and the data types run where there is no JAX."""

import pathlib
import subprocess
import sys
import tomllib

PROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
SCRIPT = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
done = []
for name in {modules!r}:
    module = importlib.import_module(name)
    done.append(name)
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(info.name)
        done.append(info.name)
print(" ".join(done))
"""


def contract():
    contracts = tomllib.loads(PROJECT.read_text())["tool"]["importlinter"]["contracts"]
    (found,) = [entry for entry in contracts if "jax" in entry.get("forbidden_modules", ())]
    return found["source_modules"], found["forbidden_modules"]


def run(modules, blocked):
    script = SCRIPT.format(modules=tuple(modules), blocked=tuple(blocked))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_every_module_of_the_contract_imports_without_jax():
    modules, blocked = contract()
    assert {"jax", "jaxlib", "flax"} <= set(blocked)
    result = run(modules, blocked)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert set(modules) <= imported
    assert {"jmoe.serving.scheduler", "jmoe.serving.engine", "jmoe.serving.grpc_server", "jmoe.planner.cli"} <= imported


def test_a_module_that_imports_jax_is_caught():
    result = run(["jax"], contract()[1])
    assert result.returncode != 0 and "jax is blocked" in result.stderr


def test_a_module_that_does_not_exist_is_an_error():
    result = run(["jmoe.no_such_module"], contract()[1])
    assert result.returncode != 0 and "no_such_module" in result.stderr
