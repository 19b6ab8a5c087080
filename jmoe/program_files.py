"""ProgramFiles: a bounded folder of compiled programs, each under the hash of all that it depends on. No JAX.

A program is machine code that the process runs: whoever can write here can run code as this user. So the folder must be
the user's own and closed to others, and a file whose checksum is wrong is not a program.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import stat
import tempfile
import zlib

from jmoe.cache_folder import cache_folder

MAX_BYTES = 8 << 30  # a program of 48 layers is some 10 MB: hundreds of configurations
_SUFFIX = ".program"
_MAGIC = b"jmoe program 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


class ProgramFiles:
    """Programs on disk, the least recently used ones removed when they outgrow the bound.

    Args:
      folder: made if need be, for this user alone.
      max_bytes: of all programs together.

    Raises:
      OSError: the folder can't be made, or others may write to it.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = MAX_BYTES):
        self.folder = pathlib.Path(folder).expanduser()
        self.max_bytes = max_bytes
        self.refused: dict[str, str] = {}  # by key: why a program that was there could not be used
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.folder.stat()
        is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{self.folder}: expected a folder of this user that nobody else may write to")

    def read(self, key: str) -> bytes | None:
        """A program, or None where there is none; one that is damaged is removed with a warning."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        head = len(_MAGIC) + _DIGEST_BYTES
        if data[:head] != _MAGIC + hashlib.sha256(data[head:]).digest():
            self.remove(key, f"expected {_MAGIC.decode().strip()!r} with its checksum, got {len(data)} other bytes")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return zlib.decompress(data[head:])

    def write(self, key: str, program: bytes) -> None:
        """Keeps a program: whole or not at all, whoever else writes it; a disk that is full is a warning."""
        body = zlib.compress(program, 1)
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".writing-", delete=False) as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(file.name, self._path(key))
            self._prune()
        except OSError as error:
            _log.warning("compile cache: %s: %s", self.folder, error)

    def remove(self, key: str, why: str) -> None:
        """Takes a program out that can't be used."""
        _log.warning("compile cache: %s is compiled again: %s", self._path(key), why)
        self.refused[key] = why
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> pathlib.Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _prune(self) -> None:
        """Removes what was used longest ago until the rest fits, and what writers that died have left."""
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process prunes too
                if path.suffix == _SUFFIX or path.name.startswith(".writing-"):
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def open_program_files(choice: str) -> ProgramFiles | None:
    """The folder that was chosen: "auto" ($JMOE_CACHE/compiled, or the platform's cache folder), "off", or a path.

    One that can't be used is a warning and None: programs are compiled then.
    """
    if choice == "off":
        return None
    try:
        return ProgramFiles(cache_folder() / "compiled" if choice == "auto" else choice)
    except OSError as error:
        _log.warning("compile cache: off: %s", error)
        return None
