"""weights_source: where a cell's parameters come from, in the dtypes that the cell keeps them in."""

import dataclasses
import os

from jmoe.checkpoints.host_buffers import Pins
from jmoe.checkpoints.load import CheckpointReader
from jmoe.checkpoints.quantized_experts import QuantizedExperts
from jmoe.checkpoints.random_weights import RandomWeights
from jmoe.config import RANDOM_WEIGHTS, ModelConfig
from jmoe.device_params import ArraySource, ParamSource
from jmoe.models.model import Model


def weights_source(
    model: str | os.PathLike[str] | Model, config: ModelConfig, pins: Pins | None = None
) -> ParamSource:
    """Parameters as `config` describes them; experts are quantised on the way where only `config` says float8.

    Args:
      model: a Hugging Face checkpoint folder, "random:SEED", or a live model.
      config: of the cell: its `dtype` and `expert_dtype` may differ from the checkpoint's.
      pins: of the memory that a checkpoint's large arrays are read into.

    Raises:
      FileNotFoundError, ValueError: as `CheckpointReader`.
      ValueError: a live model with float8 experts for a cell without.
    """
    plain = dataclasses.replace(config, expert_dtype="model")
    if isinstance(model, Model):
        source = ArraySource(*model.arrays_by_path())
        if model.config.expert_dtype == config.expert_dtype:
            return source
        if config.expert_dtype == "model":
            raise ValueError("quantization: expected 'fp8' for a live model with float8 experts, got 'none'")
        return QuantizedExperts(source)
    if isinstance(model, str) and model.startswith(RANDOM_WEIGHTS):
        return RandomWeights(config, int(model.removeprefix(RANDOM_WEIGHTS)))
    reader = CheckpointReader(os.fspath(model), plain, pins)
    if config.expert_dtype == "model":
        return reader
    if reader.has_scaled_experts:
        return CheckpointReader(os.fspath(model), config, pins)
    return QuantizedExperts(reader)
