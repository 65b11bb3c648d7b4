"""Which token id means what: bytes first, then made-up words, then GLM-4.6's own special tokens."""

from __future__ import annotations

# GLM-4.6's added tokens in the order of its tokenizer, where the first has id 151329.
# The second value is its `special` flag: a special token is dropped from answers, and the
# reasoning and tool parsers must see theirs, so those are not special.
SPECIAL_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("[MASK]", True),
    ("[gMASK]", True),
    ("[sMASK]", True),
    ("<sop>", True),
    ("<eop>", True),
    ("<|system|>", True),
    ("<|user|>", True),
    ("<|assistant|>", True),
    ("<|observation|>", True),
    ("<|begin_of_image|>", True),
    ("<|end_of_image|>", True),
    ("<|begin_of_video|>", True),
    ("<|end_of_video|>", True),
    ("<|begin_of_audio|>", True),
    ("<|end_of_audio|>", True),
    ("<|begin_of_transcription|>", True),
    ("<|end_of_transcription|>", True),
    ("<|code_prefix|>", True),
    ("<|code_middle|>", True),
    ("<|code_suffix|>", True),
    ("<think>", False),
    ("</think>", False),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<arg_key>", False),
    ("</arg_key>", False),
    ("<arg_value>", False),
    ("</arg_value>", False),
    ("/nothink", True),
    ("<|begin_of_box|>", False),
    ("<|end_of_box|>", False),
)
END_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
_FIRST_SPECIAL_OF_GLM_46 = 151329


def first_special(vocab_size: int) -> int:
    """The id of the first special token: GLM-4.6's own where the vocabulary is as large, else the last ids."""
    return min(_FIRST_SPECIAL_OF_GLM_46, vocab_size - len(SPECIAL_TOKENS))


def special_ids(vocab_size: int) -> dict[str, int]:
    """The id of each special token."""
    start = first_special(vocab_size)
    return {text: start + place for place, (text, _) in enumerate(SPECIAL_TOKENS)}


def end_ids(vocab_size: int) -> list[int]:
    """The ids that end an answer (`eos_token_id` of config.json)."""
    ids = special_ids(vocab_size)
    return [ids[text] for text in END_TOKENS]


def word(number: int) -> str:
    """A made-up word, another one for each number from 0 on: ba, be, … zu, baba, …"""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
    text = syllables[number % len(syllables)]
    number //= len(syllables)
    while number:
        number, rest = divmod(number - 1, len(syllables))
        text = syllables[rest] + text
    return text


def answerable_ids(vocab_size: int) -> list[int]:
    """The ids a model may answer with, ascending: printable ASCII, words, the end of a thought, the ends of an answer.

    The rows of all others are zero in lm_head, so a greedy answer is always readable text.
    """
    closing = [special_ids(vocab_size)["</think>"], *end_ids(vocab_size)]
    return [*range(32, 127), *range(256, first_special(vocab_size)), *sorted(closing)]
