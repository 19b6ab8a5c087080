"""The planner runs where JAX is not installed."""

import pathlib
import subprocess
import sys

PLANNER = pathlib.Path(__file__).parents[2] / "jmoe" / "planner"

BLOCKED = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "orbax"):
            raise ImportError(f"{name} is blocked in this test")
sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(f"jmoe.planner.{name}")
assert not [m for m in sys.modules if m.split(".")[0] in ("jax", "jaxlib", "flax", "orbax")]
heavy = [m for m in ("pandas", "matplotlib", "scipy.stats") if m in sys.modules]
assert not heavy, f"imported without being asked: {heavy}"
"""


def test_every_module_imports_with_jax_blocked():
    names = sorted(path.stem for path in PLANNER.glob("*.py") if path.stem != "__init__")
    assert {"search", "cli", "simulator", "plots"} <= set(names)
    done = subprocess.run([sys.executable, "-c", BLOCKED, *names], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
