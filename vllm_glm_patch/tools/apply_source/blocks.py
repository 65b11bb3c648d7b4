"""Puts a correction into the text of one file as a marked block that keeps the lines it replaces, and takes it out again."""

from __future__ import annotations

import re

_BEGIN, _WAS, _END = "// vllm-glm-patch begin ", "// vllm-glm-patch was:", "// vllm-glm-patch end "
_BLOCK = re.compile(
    rf"[ \t]*{re.escape(_BEGIN)}(?P<name>\S+)\r?\n(?P<was>(?:{re.escape(_WAS)}[^\n]*\n)+)"
    rf"(?P<now>(?:(?![ \t]*{re.escape(_BEGIN)}).*\n)*?)[ \t]*{re.escape(_END)}(?P=name)\r?\n"
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.DOTALL)


class CannotMark(Exception):
    """The lines at an anchor cannot be kept as comments; the text says why."""


def has(text: str, name: str) -> bool:
    """Whether the text has our block of this name."""
    return any(found["name"] == name for found in _BLOCK.finditer(text))


def code(text: str) -> str:
    """The text with its comments blanked, so that every position stays."""
    return _COMMENT.sub(lambda m: m.group() if m.group()[0] in "\"'" else re.sub(r"[^\n]", " ", m.group()), text)


def put(text: str, name: str, anchor: re.Match[str], replacement: str) -> str:
    """The text with the anchor replaced, and with its whole lines kept in comments.

    Raises:
        CannotMark: the lines end in the middle of something.
    """
    first = text.rfind("\n", 0, anchor.start()) + 1
    last = text.find("\n", anchor.end()) + 1
    lines = text[first:last].splitlines(keepends=True)
    if not last or any(line.rstrip().endswith("\\") for line in lines):
        raise CannotMark("the lines of the anchor end without a line break or with a backslash")
    newline = "\r\n" if lines[0].endswith("\r\n") else "\n"
    indent = re.match(r"[ \t]*", lines[0]).group()  # type: ignore[union-attr]
    new = replacement.strip("\n").replace("\n", newline + indent)
    now = text[first : anchor.start()] + new + text[anchor.end() : last]
    was = "".join(_WAS + line for line in lines)
    return f"{text[:first]}{indent}{_BEGIN}{name}{newline}{was}{now}{indent}{_END}{name}{newline}{text[last:]}"


def remove(text: str) -> str:
    """The text as it was before `put`, for all of our blocks."""
    return _BLOCK.sub(lambda m: "".join(line[len(_WAS) :] for line in m["was"].splitlines(keepends=True)), text)
