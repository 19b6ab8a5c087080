"""Where a cell's parameters come from, in the dtypes that the cell keeps them in, and their way to the devices."""

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax

from jmoe.checkpoints.host_buffers import HostBuffers
from jmoe.checkpoints.load import CheckpointReader
from jmoe.checkpoints.quantized_experts import QuantizedExperts
from jmoe.checkpoints.random_weights import RandomWeights
from jmoe.config import RANDOM_WEIGHTS, ModelConfig
from jmoe.device_params import ArraySource, DeviceParams, HalfRole, ParamSource
from jmoe.models.model import Model
from jmoe.pinned_memory import PinnedMemory


def weights_source(
    model: str | os.PathLike[str] | Model, config: ModelConfig, buffers: HostBuffers | None = None
) -> ParamSource:
    """Parameters as `config` describes them; experts are quantised on the way where only `config` says float8.

    Args:
      model: a Hugging Face checkpoint folder, "random:SEED", or a live model.
      config: of the cell: its `dtype` and `expert_dtype` may differ from the checkpoint's.
      buffers: memory that a checkpoint's large arrays are read into; None for its own.

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
    reader = CheckpointReader(os.fspath(model), plain, buffers)
    if config.expert_dtype == "model":
        return reader
    if reader.has_scaled_experts:
        return CheckpointReader(os.fspath(model), config, buffers)
    return QuantizedExperts(reader)


def place_weights(
    source: ParamSource | str | os.PathLike[str] | Model,
    params: DeviceParams,
    roles: Sequence[HalfRole],
    buffers: HostBuffers,
    progress: Callable[[str], None],
) -> dict[HalfRole, dict[str, jax.Array]]:
    """The parameters of some roles on their devices, by role and path; no buffer is kept.

    Args:
      source: as of `weights_source`, or anything that parameters can be read from as the cell keeps them.
      params: the cell's.
      roles: "attention", "expert" or both.
      buffers: for what is read; pinned meanwhile where devices are GPUs.
      progress: gets a line now and then.
    """
    with PinnedMemory(params.devices) as buffers.pins:
        try:
            if isinstance(source, (str, os.PathLike, Model)):
                source = weights_source(source, params.cell.model, buffers)
            return params.place_roles(roles, source, progress)
        finally:
            buffers.forget()
            buffers.pins = None
