"""Tokenizer and incremental detokenizer, against `tokenizers`' own decode of the whole."""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import TEXT, byte_fallback_backend, byte_level_backend
from tokenizers import decoders, models

from jmoe.serving.text import detokenizer
from jmoe.serving.text.tokenizer import Tokenizer

BACKENDS = {"byte_level": byte_level_backend(), "byte_fallback": byte_fallback_backend()}


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: random.Random | None = None, **options) -> str:
    """What a stream shows: pieces of one or more tokens, then the flush."""
    pieces, text, start = tokenizer.detokenizer(**options), "", 0
    while start < len(ids):
        stop = start + (cuts.randint(1, 4) if cuts else 1)
        text += pieces.push(ids[start:stop])
        start = stop
    return text + pieces.flush()


@pytest.mark.parametrize("kind", BACKENDS)
@given(data=st.data(), seed=st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_stream_of_any_ids_equals_the_decode_of_the_whole(kind, data, seed):
    backend = BACKENDS[kind]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 3), max_size=40))
    tokenizer = Tokenizer(backend)
    whole = backend.decode(ids, skip_special_tokens=True)
    assert streamed(tokenizer, ids, random.Random(seed), continues=False) == whole
    assert tokenizer.decode(ids) == whole


@pytest.mark.parametrize("kind", BACKENDS)
def test_output_after_a_prompt_is_what_the_whole_text_adds(kind):
    backend = BACKENDS[kind]
    tokenizer = Tokenizer(backend)
    prompt, whole = tokenizer.encode("the"), tokenizer.encode("the Paris is 日本 🙂")
    output = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    added = backend.decode(prompt + output).removeprefix(backend.decode(prompt))
    assert streamed(tokenizer, output) == added == " Paris is 日本 🙂"


def test_half_a_character_is_held_back_until_it_is_whole():
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    letters = detokenizer.byte_alphabet()
    by_byte = {byte: letter for letter, byte in letters.items()}
    ids = [BACKENDS["byte_level"].token_to_id(by_byte[b]) for b in "🙂é".encode()]
    pieces = tokenizer.detokenizer()
    assert [pieces.push([i]) for i in ids] == ["", "", "", "🙂", "", "é"]
    assert pieces.push(ids[:2]) == ""
    assert pieces.flush() == "\ufffd"  # one for a cut character, as UTF-8 decoders agree


def test_byte_tokens_are_held_back_until_their_run_ends():
    backend = BACKENDS["byte_fallback"]
    pieces = Tokenizer(backend).detokenizer()
    run = [backend.token_to_id(f"<0x{b:02X}>") for b in "é".encode()]
    assert [pieces.push([i]) for i in run] == ["", ""]
    assert pieces.push([backend.token_to_id("▁is")]) == "é is"
    assert pieces.push(run[:1]) == "" and pieces.flush() == "\ufffd"


def test_pushing_looks_each_token_up_once():
    """Linear, not quadratic: work is counted, not timed."""
    lookups = []
    backend = BACKENDS["byte_level"]
    tokenizer = Tokenizer(backend)
    plain = tokenizer._token_bytes
    pieces = detokenizer.ByteLevelDetokenizer(lambda i: lookups.append(i) or plain(i))
    ids = tokenizer.encode(TEXT * 20)
    assert "".join(pieces.push([i]) for i in ids) + pieces.flush() == TEXT * 20
    assert lookups == ids


def test_single_digits_and_special_tokens():
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    assert len(tokenizer.encode("2024")) == 4
    ids = tokenizer.encode("<|im_start|>the<think>")
    assert ids[0] == BACKENDS["byte_level"].token_to_id("<|im_start|>")
    assert tokenizer.decode(ids) == "the<think>"  # special tokens have no text, added ones do
    ids = tokenizer.encode("fox<think>two words 日")
    assert BACKENDS["byte_level"].token_to_id("two words") in ids and tokenizer.decode(ids) == "fox<think>two words 日"


def test_truncation_and_padding_in_the_file_do_not_change_prompts():
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert Tokenizer(backend).encode(TEXT) == byte_level_backend().encode(TEXT).ids
    assert Tokenizer(backend).encode("fox") == byte_level_backend().encode("fox").ids


def test_other_decoders_are_refused_by_name():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"got WordPiece"):
        Tokenizer(backend)
    backend.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()])
    with pytest.raises(ValueError, match=r"tokenizer.json decoder"):
        Tokenizer(backend)


@pytest.mark.parametrize(
    ("scheme", "strips"), [("always", True), ("never", False)], ids=["adds a first space", "adds none"]
)
def test_metaspace_decoder(scheme, strips):
    backend = byte_fallback_backend()
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    ids = [backend.token_to_id(t) for t in ("▁Paris", "▁is", "<0x41>")]
    assert Tokenizer(backend).decode(ids) == backend.decode(ids) == ("" if strips else " ") + "Paris is<0x41>"


def save(folder, *, config=None, generation=None, model=None, template=None):
    """A checkpoint folder without weights."""
    byte_level_backend().save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config", config), ("generation_config", generation), ("config", model)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_eos_ids_are_gathered_from_every_file(tmp_path):
    save(
        tmp_path,
        config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"},
        generation={"eos_token_id": [7, 0]},
        model={"eos_token_id": 0},
    )
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.eos_token_ids == (7, 0, 2)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    assert tokenizer.chat_template is None


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no .*tokenizer.json"):
        Tokenizer.from_dir(tmp_path)


def test_encode_chat_uses_the_template_and_adds_no_special_tokens_of_its_own(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.from_dir(save(tmp_path, template=template, config={"chat_template": "not this one"}))
    ids = tokenizer.encode_chat([{"role": "user", "content": "the fox"}])
    assert ids == tokenizer.encode("<|im_start|>user\nthe fox<|im_end|>", add_special_tokens=False)
    assert [ids[0], ids[-1]] == [1, 2]
