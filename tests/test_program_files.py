"""The folder of compiled programs: what is damaged, too much or not the user's own is never run."""

import os
import time

import pytest

from jmoe.program_files import ProgramFiles, open_program_files


def test_a_program_comes_back_and_another_key_does_not(tmp_path):
    files = ProgramFiles(tmp_path / "a" / "b")
    files.write("key", b"machine code" * 1000)
    assert ProgramFiles(tmp_path / "a" / "b").read("key") == b"machine code" * 1000
    assert files.read("other") is None
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in files.folder.iterdir()] == ["key.program"], "nothing half written is left"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_program_is_removed_with_a_warning(tmp_path, caplog, damage):
    files = ProgramFiles(tmp_path)
    files.write("key", os.urandom(4096))
    path = tmp_path / "key.program"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:100], "flipped": data, "empty": b"", "foreign": b"\x80\x04pickle" * 99}[damage])
    assert files.read("key") is None and not path.exists()
    assert "key.program is compiled again: expected 'jmoe program 1' with its checksum" in caplog.text


def test_what_was_used_longest_ago_goes_first(tmp_path):
    files = ProgramFiles(tmp_path, max_bytes=5000)
    for age, name in enumerate("abc"):
        files.write(name, os.urandom(1500))
        os.utime(tmp_path / f"{name}.program", (time.time() - 100 + age,) * 2)
    (tmp_path / "note.txt").write_text("not ours")
    assert files.read("a") is not None  # used now
    files.write("d", os.urandom(1500))
    assert [name for name in "abcd" if files.read(name) is not None] == ["a", "c", "d"]
    assert (tmp_path / "note.txt").exists()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="nobody else may write to"):
        ProgramFiles(tmp_path / "open")
    assert open_program_files(str(tmp_path / "open")) is None and "compile cache: off" in caplog.text


def test_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "jmoe"))
    auto, chosen = open_program_files("auto"), open_program_files(str(tmp_path / "mine"))
    assert auto is not None and auto.folder == tmp_path / "jmoe" / "compiled"
    assert chosen is not None and chosen.folder == tmp_path / "mine"
    assert open_program_files("off") is None
    (tmp_path / "file").write_text("")
    assert open_program_files(str(tmp_path / "file")) is None


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
    files = ProgramFiles(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    files.write("key", b"code")
    assert files.read("key") is None and "No space left on device" in caplog.text
