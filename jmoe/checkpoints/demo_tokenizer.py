"""Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` from a GGUF file's tokenizer facts."""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jmoe.checkpoints.demo_gguf import TokenizerFacts


def build_tokenizer(facts: TokenizerFacts) -> Tokenizer:
    """A byte-level BPE tokenizer as `smollm` means it: single digits, then byte-level words without a prefix space.

    Raises:
      ValueError: another pre-tokenizer (a GGUF file only names it).
    """
    if facts.pre != "smollm":
        raise ValueError(f"expected the pre-tokenizer 'smollm', got {facts.pre!r}")
    vocabulary = {token: token_id for token_id, token in enumerate(facts.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in facts.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(facts.tokens[i], special=True, normalized=False) for i in facts.special])
    return tokenizer


def write_tokenizer(folder: pathlib.Path, facts: TokenizerFacts, max_position: int) -> None:
    """Writes the three files into a checkpoint folder."""
    build_tokenizer(facts).save(str(folder / "tokenizer.json"))
    names = {"bos_token": facts.bos_token_id, "eos_token": facts.eos_token_id, "pad_token": facts.pad_token_id}
    settings = {name: facts.tokens[token_id] for name, token_id in names.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
        "chat_template": facts.chat_template,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {f"{name}_id": token_id for name, token_id in names.items()})


def _write_json(path: pathlib.Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
