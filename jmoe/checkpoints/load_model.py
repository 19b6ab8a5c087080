"""load_model: a whole checkpoint as one live model on the default device, for the reference and for notebooks."""

import dataclasses
import pathlib
from typing import Literal

import jax

from jmoe.checkpoints.load import CheckpointReader
from jmoe.config import ModelConfig
from jmoe.models.model import Model


def load_model(folder: str | pathlib.Path, dtype: Literal["float32", "bfloat16"] | None = None) -> Model:
    """Reads a Hugging Face checkpoint folder into a `Model`; the host holds one parameter at a time.

    Args:
      folder: with `config.json` and safetensors.
      dtype: of the parameters; None takes the one that `config.json` names.

    Raises:
      FileNotFoundError, ValueError: as `CheckpointReader`.
    """
    config = ModelConfig.from_hf(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    reader = CheckpointReader(folder, config)

    def read(role: Literal["attention", "expert"]) -> dict[str, jax.Array]:
        # Blocking: the copies to the device would otherwise keep every host array alive until the end.
        return {path: jax.block_until_ready(jax.device_put(reader.read(role, path))) for path in reader.shapes(role)}

    return Model.from_arrays(config, read("attention"), read("expert"))
