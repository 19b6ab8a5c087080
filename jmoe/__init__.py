"""jmoe: Mixture-of-Experts language models in JAX, attention on one device mesh and experts on another."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The face: public names and where they live. Loaded on first use, so that `import jmoe` starts no JAX backend.
_FACE = {
    "serve": "jmoe.serving.server",
    "Server": "jmoe.serving.server",
    "SamplingParams": "jmoe.serving.requests",
    "MeshConfig": "jmoe.sharding.mesh_config",
    "ExpertPlacement": "jmoe.sharding.placement",
    "ModelConfig": "jmoe.config",
}
__all__ = ["ExpertPlacement", "MeshConfig", "ModelConfig", "SamplingParams", "Server", "serve"]

if TYPE_CHECKING:
    from jmoe.config import ModelConfig
    from jmoe.serving.requests import SamplingParams
    from jmoe.serving.server import Server, serve
    from jmoe.sharding.mesh_config import MeshConfig
    from jmoe.sharding.placement import ExpertPlacement


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'jmoe' has no attribute {name!r}")
