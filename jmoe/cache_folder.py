"""Where jmoe keeps what it has fetched, converted or compiled. No JAX."""

import os
import pathlib
import sys


def cache_folder() -> pathlib.Path:
    """Where downloads are kept: $JMOE_CACHE, or `jmoe` in the platform's cache folder."""
    if chosen := os.environ.get("JMOE_CACHE"):
        return pathlib.Path(chosen).expanduser()
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "jmoe"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return pathlib.Path(local) / "jmoe"
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jmoe"
