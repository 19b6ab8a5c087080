"""Packaging: one name for each module, what wheel and sdist hold, and the floors."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("sharding", "pallas_kernels", "serving")  # of the top level, installed inside jmoe
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def python(*words: str, cwd) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def sources() -> dict[str, pathlib.Path]:
    """Every module of the project by its name, the links not followed."""
    found = {}
    for top in ("jmoe", *FOLDERS):
        for folder, _, names in os.walk(ROOT / top, followlinks=False):
            for name in names:
                path = pathlib.Path(folder, name)
                if path.suffix == ".py":
                    parts = [*([] if top == "jmoe" else ["jmoe"]), *path.relative_to(ROOT).with_suffix("").parts]
                    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_the_links_are_relative_and_right(name):
    link = ROOT / "jmoe" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", FOLDERS)
def test_there_is_one_name(name, tmp_path):
    code = f"import importlib.util, jmoe.{name} as found; print(found.__name__, importlib.util.find_spec('{name}'))"
    assert python("-c", code, cwd=tmp_path).split() == [f"jmoe.{name}", "None"]


def test_imports_of_the_top_folders_are_light(tmp_path):
    modules = ", ".join(["jmoe", *(f"jmoe.{name}" for name in FOLDERS)])
    code = f"import sys, {modules}; print({{name.partition('.')[0] for name in sys.modules}})"
    loaded = ast.literal_eval(python("-c", code, cwd=tmp_path))
    assert not loaded & {"jax", "jaxlib", "flax", "numpy", "grpc", "tokenizers", "pandas"}


def test_every_package_is_listed():
    packages = {name for name, path in sources().items() if path.name == "__init__.py"}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, built from a copy: setuptools leaves its files where it builds."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("jmoe", *FOLDERS):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for hook in ("build_wheel", "build_sdist"):
        python("-c", BUILD, hook, str(out), cwd=tree)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_module_and_nothing_else(distributions):
    files = {name for name in zipfile.ZipFile(distributions[0]).namelist() if ".dist-info/" not in name}
    modules = {
        name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for name, path in sources().items()
    }
    assert {name for name in files if name.endswith(".py")} == modules
    data = {"jmoe/py.typed", "jmoe/planner/hardware.toml", "jmoe/planner/models.toml"}
    data |= {"jmoe/pallas_kernels/block_table.json"}
    data |= {f"jmoe/serving/protos/{name}" for name in ("jmoe.proto", "jmoe_pb2.pyi")}
    assert files - modules == data


def test_a_wheel_can_be_built_from_the_sdist(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    python("-c", BUILD, "build_wheel", str(tmp_path), cwd=tree)
    (again,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def imported(path: pathlib.Path) -> set[str]:
    """The jmoe modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names.add(node.module or "")
    return {name for name in names if name.partition(".")[0] in ("jmoe", *FOLDERS)}


def floor(module: str) -> int:
    """0 for pallas_kernels, 1 for sharding, 2 for jmoe, 3 for serving."""
    order = ("pallas_kernels", "sharding", None, "serving")
    part = module.split(".")[1:2]
    return order.index(part[0] if part and part[0] in FOLDERS else None)


def test_nothing_imports_upward_or_by_a_bare_name():
    wrong = [
        f"{module} imports {name}"
        for module, path in sources().items()
        for name in imported(path)
        if not name.startswith("jmoe") or (floor(name) > floor(module) and module != "jmoe")  # the face hands names on
    ]
    assert wrong == []


def test_no_extra_of_the_test_command_brings_torch():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["planner"]]
    assert "jmoe[planner]" in extras["test"]
    assert not [name for name in wanted if name.startswith(("torch", "transformers"))]
    assert "torch==2.13.0" in extras["oracle"]
