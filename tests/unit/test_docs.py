"""The words: what they name exists, and what exists is named."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from vllm_glm_patch import Settings, catalog
from vllm_glm_patch.cli import app
from vllm_glm_patch.fence.options import PREFIX as FENCE
from vllm_glm_patch.settings import CACHE, MOE_BACKENDS, SHAPE_POLICIES, names

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
USAGE = ROOT / "docs" / "usage.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
VARIABLES = [field.metadata["env"] for field in fields(Settings)]
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
_COMMAND = re.compile(r"(?:^|`)(?:\S*/)?vllm-glm-patch[ \t]+([a-z][a-z-]*)", re.MULTILINE)
_VARIABLE = re.compile(r"\bVLLM_GLM_PATCH(?:_[A-Z]+)*\b")


def not_in_code(wanted: Iterable[str], text: str) -> set[str]:
    """Those of `wanted` that the text nowhere names as code: whole, not as a part of a longer name."""
    code = "\n".join(found.group() for found in _CODE.finditer(text))
    return {name for name in wanted if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", code)}


def broken_links(file: Path) -> set[str]:
    """The relative links of a Markdown file that lead nowhere: no such file, or no such heading in it."""
    links = _LINK.findall(_FENCE.sub("", file.read_text(encoding="utf-8")))
    return {link for link in links if not link.startswith(("http://", "https://", "mailto:")) and not leads(file, link)}


def leads(file: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = (file.parent / path) if path else file
    if not target.exists():
        return False
    return not heading or heading in headings(target.read_text(encoding="utf-8"))


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a Markdown file's headings."""
    titles = re.findall(r"^#+ +(.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def unknown_commands(text: str) -> set[str]:
    """Commands of ours that the text calls in its code and that do not exist."""
    return {found for code in _CODE.findall(text) for found in _COMMAND.findall(code)} - COMMANDS


def unknown_variables(text: str) -> set[str]:
    """Variables of ours that the text names and that no setting has, nor the fence, nor the cache."""
    known = {*VARIABLES, CACHE}
    return {name for name in _VARIABLE.findall(text) if name not in known and not name.startswith(FENCE)}


@pytest.mark.parametrize(
    "wanted", [names(), VARIABLES, SHAPE_POLICIES, MOE_BACKENDS], ids=["keys", "variables", "policies", "backends"]
)
@pytest.mark.parametrize("document", [USAGE, README], ids=lambda file: file.name)
def test_every_setting_is_explained(document: Path, wanted: tuple[str, ...]) -> None:
    assert not not_in_code(wanted, document.read_text(encoding="utf-8"))


def test_every_patch_is_in_the_table_of_the_readme_with_its_releases() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| .* \| ([^|]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE))
    known = catalog.releases()
    expected = {}
    for patch in catalog.patches():
        affected = [release for release in known if patch.affects.contains(release)]
        expected[patch.id] = f"{affected[0]} – {affected[-1]}"
    assert rows == expected


def test_every_state_of_the_table_at_start_is_explained() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| ", USAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"applied", catalog.NOT_NEEDED, catalog.SWITCHED_OFF, catalog.REFUSED, catalog.NOT_MADE} <= set(rows)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    assert not broken_links(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_and_variable_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not unknown_commands(text)
    assert not unknown_variables(text)


def test_every_command_is_explained() -> None:
    assert set(_COMMAND.findall(USAGE.read_text(encoding="utf-8"))) == COMMANDS


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert f"\nmake {target} " in README.read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda file: file.name)
def test_a_picture_is_drawn_on_a_page_of_its_own_and_says_what_it_shows(picture: Path) -> None:
    svg = "{http://www.w3.org/2000/svg}"
    drawing = ET.parse(picture).getroot()
    page = drawing.find(f"{svg}rect")
    assert page is not None, "without a page of its own it cannot be read on white and on dark"
    assert (page.get("width"), page.get("height")) == (drawing.get("width"), drawing.get("height"))
    assert all((drawing.findtext(f"{svg}{name}") or "").strip() for name in ("title", "desc"))


def test_the_numbers_of_the_picture_are_those_of_the_allocator() -> None:
    drawn = " ".join(ET.parse(ROOT / "docs" / "images" / "segment.svg").getroot().itertext())
    for tokens in (8190, 8191, 8192):
        assert f"{tokens} tokens" in drawn
        assert f"{tokens * 8 * 4:,} bytes" in drawn
        rest = -(tokens * 8 * 4) % 512
        assert (f"{rest} bytes of rounding" if rest else "no rounding") in drawn


# The checks themselves can fail.


def test_a_setting_that_is_missing_or_only_part_of_another_name_is_found() -> None:
    text = "strict in prose, `VLLM_GLM_PATCH_STRICT`, and\n```\nshape_policy=auto\n```\n"
    assert not_in_code(["strict", "shape_policy", "VLLM_GLM_PATCH", "auto"], text) == {"strict", "VLLM_GLM_PATCH"}


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# The `first` part: one\n", encoding="utf-8")
    document = tmp_path / "links.md"
    document.write_text(
        "# Own\n[a](there.md) [b](missing.md) [c](there.md#the-first-part-one) [d](there.md#second)\n"
        "[e](#own) [f](#other) [g](https://example.org/x) ![h](missing.svg)\n```\n[i](ignored.md)\n```\n",
        encoding="utf-8",
    )
    assert broken_links(document) == {"missing.md", "there.md#second", "#other", "missing.svg"}


def test_a_command_or_variable_that_does_not_exist_is_found() -> None:
    text = "Run `vllm-glm-patch repair` or\n```sh\nvllm-glm-patch doctor --plain\n.venv/bin/vllm-glm-patch mend\n```\n"
    assert unknown_commands(text + "and in prose vllm-glm-patch made for you") == {"repair", "mend"}
    assert unknown_variables("`VLLM_GLM_PATCH_STRICT`, `VLLM_GLM_PATCH_LOUD=1`") == {"VLLM_GLM_PATCH_LOUD"}
