"""apply-source: corrects known trees, leaves right ones, refuses others untouched, and takes every byte back."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import command_line
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.apply_source import blocks
from vllm_glm_patch.tools.apply_source.plan import changed, corrections, plan
from vllm_glm_patch.tools.apply_source.write import write

ARRAY = "csrc/extra/broadcast_load_epilogue_array_c3x.hpp"
DENSE = "csrc/extra/broadcast_load_epilogue_c3x.hpp"
KERNEL = "csrc/moe/kernels/moe_permute_unpermute_kernel.cu"
OPERATOR = "csrc/moe/moe_permute_unpermute_op.cu"
# Small files of our own, with the few tokens that the anchors look for.
WRONG_EPILOGUE = """// copy_if(pred, filter(tCgCol), filter(tCrCol)); is only spoken of here
void ours() {
  Tensor pred = make_tensor<bool>(shape(tCgCol));
  for (...) pred(i) = get<0>(tCcCol(i)) < m;
  copy_if(pred, filter(tCgCol), filter(tCrCol));
}
"""
RIGHT_EPILOGUE = "void ours() {\n  pred(i) = get<0>(where(i)) < m;\n  copy_if(pred, from, to);\n}\n"
WRONG_KERNEL = """void ours() {
\tsmem_expert_map[i] = expert_map_ptr[i];
\tauto local_expert_idx = smem_expert_map[topk_id];
}
"""
RIGHT_KERNEL = (
    "void ours() {\n  e = expert_map_ptr ? expert_map_ptr[i] : i;\n  if (topk_id < 0 || topk_id >= num_experts) last();\n}\n"
)
WRONG_OPERATOR = """void ours() {
  if (expert_map.has_value()) {
    const int* expert_map_ptr = get_ptr<int>(expert_map.value());
    preprocessTopkIdLauncher(get_ptr<int>(sorted), expert_map_ptr);
  }
}
"""
LATER_OPERATOR = """void ours() {
  if (expert_map.has_value() || build_inverse) {
    const int* expert_map_ptr = expert_map.has_value() ? some : nullptr;
    preprocessTopkIdLauncher(sorted, expert_map_ptr);
  }
}
"""
EARLY_OPERATOR = WRONG_OPERATOR.replace("sorted", "copy_topk_ids")
RIGHT_OPERATOR = "void ours() {\n  const int* expert_map_ptr = expert_map.has_value() ? some : nullptr;\n}\n"
WRONG = {ARRAY: WRONG_EPILOGUE, DENSE: WRONG_EPILOGUE, KERNEL: WRONG_KERNEL, OPERATOR: WRONG_OPERATOR}
RIGHT = {ARRAY: RIGHT_EPILOGUE, DENSE: RIGHT_EPILOGUE, KERNEL: RIGHT_KERNEL, OPERATOR: RIGHT_OPERATOR}


def tree(folder: Path, files: dict[str, str], newline: str = "\n") -> Path:
    """A source tree with these files."""
    for name, text in {"vllm/__init__.py": "", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.replace("\n", newline).encode())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_wrong_tree_is_corrected_in_all_files_and_scan_calls_it_right(tmp_path: Path) -> None:
    tree(tmp_path, WRONG)
    result = command_line.run("apply-source", tmp_path, "--json")
    assert result.code == 0
    states = {(f["file"], c["id"]): c["state"] for f in result.json()["files"] for c in f["corrections"]}
    assert states.pop((OPERATOR, "routing-ids/always-also-sorted")) == "right as it is"
    assert set(states.values()) == {"corrected"}
    assert result.json()["changed"] == 4
    code = blocks.code((tmp_path / ARRAY).read_text())
    assert "filter(" not in code
    assert "copy_if(pred, column_from, column_to);" in code
    scanned = command_line.run("scan", tmp_path, "--json", "--only", "scale-overread", "--only", "routing-ids").json()
    assert {d["id"]: d["present"] for d in scanned["defects"]} == {"routing-ids": False, "scale-overread": False}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_twice_changes_nothing_and_reverse_gives_every_byte_and_mode_back(tmp_path: Path, newline: str) -> None:
    tree(tmp_path, WRONG, newline)
    (tmp_path / KERNEL).chmod(0o755)
    before = contents(tmp_path)
    assert command_line.run("apply-source", tmp_path).code == 0
    once = contents(tmp_path)
    assert set(once) == set(before), "something was left beside the files"
    assert not any(b"\n" in text.replace(newline.encode(), b"") for text in once.values())
    assert command_line.run("apply-source", tmp_path, "--check").code == 0
    assert command_line.run("apply-source", tmp_path).code == 0
    assert contents(tmp_path) == once != before
    assert command_line.run("apply-source", tmp_path, "--reverse", "--check").code == 1
    assert command_line.run("apply-source", tmp_path, "--reverse").code == 0
    assert contents(tmp_path) == before
    assert stat.S_IMODE((tmp_path / KERNEL).stat().st_mode) == 0o755


def test_check_prints_the_difference_and_changes_nothing(tmp_path: Path) -> None:
    before = contents(tree(tmp_path, WRONG))
    result = command_line.run("apply-source", tmp_path, "--check")
    assert result.code == 1
    assert f"--- a/{ARRAY}" in result.out
    assert "+  copy_if(pred, column_from, column_to);" in result.out
    assert "would be corrected" in result.out
    assert contents(tmp_path) == before


def test_a_right_tree_stays_as_it_is(tmp_path: Path) -> None:
    before = contents(tree(tmp_path, RIGHT))
    assert command_line.run("apply-source", tmp_path, "--check").code == 0
    assert command_line.run("apply-source", tmp_path).code == 0
    assert command_line.run("apply-source", tmp_path, "--reverse").code == 0
    assert contents(tmp_path) == before


def test_the_condition_of_later_releases_is_corrected(tmp_path: Path) -> None:
    tree(tmp_path, {**RIGHT, OPERATOR: LATER_OPERATOR})
    assert command_line.run("apply-source", tmp_path, "--json").json()["changed"] == 1
    assert "build_inverse" not in blocks.code((tmp_path / OPERATOR).read_text())
    assert command_line.run("apply-source", tmp_path, "--check").code == 0


def test_what_cannot_be_corrected_this_way_is_left_and_told(tmp_path: Path) -> None:
    tree(tmp_path, {**WRONG, OPERATOR: EARLY_OPERATOR})
    result = command_line.run("apply-source", tmp_path)
    assert result.code == 0
    assert "the patch routing-ids does it when vLLM starts" in result.out
    assert (tmp_path / OPERATOR).read_text() == EARLY_OPERATOR


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (DENSE, "void other() {}\n", "found 0 times"),
        (DENSE, WRONG_EPILOGUE * 2, "found 2 times"),
        (KERNEL, WRONG_KERNEL.replace("= expert_map_ptr[i]", "= map[i]"), "routing-ids/no-map is found 0 times"),
        (OPERATOR, "// " + WRONG_OPERATOR.replace("\n", "\n// ") + "\n", "routing-ids/always is found 0 times"),
        (KERNEL, WRONG_KERNEL.replace("[topk_id];", "[topk_id]; \\"), "with a backslash"),
    ],
    ids=["no place", "two places", "one of two", "commented out", "backslash"],
)
def test_an_unknown_file_refuses_the_whole_tree_untouched(tmp_path: Path, name: str, text: str, told: str) -> None:
    before = contents(tree(tmp_path, {**WRONG, name: text}))
    result = command_line.run("apply-source", tmp_path)
    assert result.code == 2
    assert told in result.err
    assert str(tmp_path / name) in result.err
    assert contents(tmp_path) == before


def test_a_folder_without_kernel_sources_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {})
    result = command_line.run("apply-source", tmp_path)
    assert result.code == 2
    assert "an installed package has none" in result.err
    assert command_line.run("apply-source", tmp_path / "nowhere").code == 2


def test_a_file_that_cannot_be_put_in_place_leaves_all_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tree(tmp_path, WRONG))
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name.endswith(".new") and target.name == Path(OPERATOR).name:
            raise PermissionError(13, os.strerror(13), str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match="Nothing in the tree was changed"):
        write(list(changed(plan(tmp_path))))
    assert contents(tmp_path) == before


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\\"), max_size=40),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\\"), max_size=40),
    st.sampled_from(["", "\t", "   "]),
)
def test_a_block_always_comes_out_as_it_was(head: str, tail: str, indent: str) -> None:
    text = f"{head}\n{indent}the anchor;{tail}\n"
    (anchor,) = re.finditer("the anchor;", text)
    marked = blocks.put(text, "some/thing", anchor, "one;\ntwo;")
    assert blocks.has(marked, "some/thing")
    assert blocks.remove(marked) == text


def test_every_correction_has_what_it_needs_and_a_name_of_its_own() -> None:
    names = [name for name, _ in corrections()]
    assert len(set(names)) == len(names) > 0
    for name, table in corrections():
        assert {"id", "file", "anchor", "unless", "replacement", "why"} <= set(table), name
        assert ("leave" in table) == ("leave_why" in table), name
