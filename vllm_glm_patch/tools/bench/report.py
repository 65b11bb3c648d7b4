"""The report of one or several results: a page that needs no network, and the pictures in it as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import html, report_kernel, report_serve
from .schema import KERNEL, SERVE

_PARTS: dict[str, Any] = {SERVE: report_serve, KERNEL: report_kernel}


def write_report(results: Sequence[tuple[str, dict[str, Any]]], folder: Path) -> list[Path]:
    """Write report.html and the PNG files; the files that were written.

    Args:
        results: a name that tells them apart, and the result of `bench serve` or `bench kernel`, for each.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def keep(pictures: dict[str, bytes], prefix: str) -> None:
        for title, png in pictures.items():
            file = folder / f"{prefix}{_file_name(title)}.png"
            file.write_bytes(png)
            written.append(file)

    top = sections = ""
    for kind, part in _PARTS.items():
        alike = [(name, result) for name, result in results if result["kind"] == kind]
        if alike:
            top += html.note(part.EXPLANATION)
        if len(alike) > 1:
            top += part.overview(alike)
            if kind == KERNEL:
                keep(report_kernel.pictures_of_all(alike), "")
    for number, (name, result) in enumerate(results, start=1):
        part = _PARTS[result["kind"]]
        pictures = part.pictures(result)
        keep(pictures, f"{number}-")
        sections += part.section(name, result, pictures)
    page = folder / "report.html"
    page.write_text(html.page("With the patches and without", top + sections), encoding="utf-8")
    return [page, *written]


def _file_name(title: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in title)
