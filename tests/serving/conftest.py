"""Fixtures of several test files of this folder."""

import numpy as np
import pytest

from jmoe.checkpoints.save import save_hf
from jmoe.config import ModelConfig
from jmoe.models.model import array_specs


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A real checkpoint of random weights: one layer, 6 experts, no tokenizer."""
    config = ModelConfig("mixtral", 97, 24, 1, 3, 3, 8, 6, 3, 16, dtype="float32", max_position=4096)
    rng = np.random.default_rng(0)
    halves = [
        {path: rng.normal(size=spec.shape, scale=max(spec.fan_in, 1) ** -0.5) for path, spec in half.items()}
        for half in array_specs(config)
    ]
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_hf(folder, config, *halves)
    return folder
