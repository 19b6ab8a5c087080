"""What serving reads of a model before it loads it: its configuration, and its tokenizer. No JAX."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from jmoe.config import ModelConfig
from jmoe.serving.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jmoe.models.model import Model


def describe(
    model: "str | pathlib.Path | Model", tokenizer: Tokenizer | str | pathlib.Path | None
) -> tuple[ModelConfig, Tokenizer | None]:
    """The model's facts, with every end-of-sequence id that its files name, and its tokenizer if it has one."""
    if isinstance(model, str | pathlib.Path):
        config = ModelConfig.from_hf(model)
        if tokenizer is None and (pathlib.Path(model) / "tokenizer.json").is_file():
            tokenizer = model
    else:
        config = model.config
    text = Tokenizer.from_dir(tokenizer) if isinstance(tokenizer, str | pathlib.Path) else tokenizer
    if text is not None:
        known = (*config.eos_token_ids, *(i for i in text.eos_token_ids if 0 <= i < config.vocab_size))
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(known)))
    return config, text
