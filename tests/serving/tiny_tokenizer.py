"""Tiny real tokenizers for tests, trained here: a byte-level one (Qwen3's kind) and a byte-fallback one (Mixtral's)."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = "the quick brown fox jumps over the lazy dog. Grüße aus Köln: naïve café 東京 日本語 🙂🙃 Paris is France 123"
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n"
)


def byte_level_backend() -> tokenizers.Tokenizer:
    """A small byte-level BPE in which letters outside ASCII are cut over tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return backend


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """U+2581 for spaces, <0xNN> for bytes without a token, a first space that the encoder adds."""
    words = ["▁the", "▁Paris", "the", "Paris", "▁is", "▁a", "▁", "a", "t", "h", "e", "P", "r", "i", "s", "▁▁", "日"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {word: 259 + i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend
