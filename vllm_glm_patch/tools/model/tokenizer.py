"""A byte-level tokenizer in GLM-4.6's layout: one token a byte, so a text of n ASCII letters is n tokens."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_glm_patch.tools.model.chat import CHAT_TEMPLATE
from vllm_glm_patch.tools.model.spec import ModelSpec
from vllm_glm_patch.tools.model.vocabulary import SPECIAL_TOKENS, first_special, word


def write_tokenizer(folder: Path, spec: ModelSpec) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`.

    The id of a byte is its value. The words that follow are never made from a text, for there are no merges;
    they give every id that a model can answer a text of its own.

    Raises:
        OSError: the folder cannot be written.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    space = letters[ord(" ")]
    for number in range(first_special(spec.vocab_size) - 256):
        vocab[space + word(number)] = 256 + number
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in SPECIAL_TOKENS])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": spec.max_position_embeddings,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it prints, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
