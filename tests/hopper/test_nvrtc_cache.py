"""The cache of compiled kernels: one compilation for all processes, whole entries only, nothing that others may write."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import nvrtc_child
import pytest
from nvrtc_child import SOURCES, SlowCompiler

from vllm_glm_patch.moe.hopper import cache, library
from vllm_glm_patch.moe.hopper.errors import HopperError

CHILD = Path(__file__).with_name("nvrtc_child.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "compilations"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def ask(root: Path, log: Path, monkeypatch: pytest.MonkeyPatch):
    """Asks for the kernels in this process, with a quick compiler."""
    monkeypatch.setattr(nvrtc_child.time, "sleep", lambda seconds: None)

    def ask(sources: dict[str, str] = SOURCES, identity: str = "stand-in 1.0") -> library.Images:
        compiler = SlowCompiler(log)
        compiler.identity = identity
        return library.compiled(compiler, sources, root)  # type: ignore[arg-type]

    return ask


def compilations(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.exists() else []


def entries(root: Path) -> list[Path]:
    return [path for path in (root / "hopper").iterdir() if path.is_dir()]


def start(root: Path, log: Path, go: Path, goes_wrong: str = "") -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])}
    child = subprocess.Popen(
        [sys.executable, CHILD, root, log, go, goes_wrong], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.stderr.read() if child.stderr else ""
    return child


def test_eight_processes_at_once_compile_once(root: Path, log: Path, tmp_path: Path) -> None:
    children = [start(root, log, tmp_path / "go") for _ in range(8)]
    (tmp_path / "go").touch()
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 8, outputs
    assert len({out for out, _ in outputs}) == 1
    assert sorted(line.split()[1] for line in compilations(log)) == ["a.cu", "b.cu"]
    assert len({line.split()[0] for line in compilations(log)}) == 1, "two processes compiled"
    assert [path.name for path in (root / "hopper").iterdir() if path.name.startswith(".")] == []


def test_a_process_that_dies_while_compiling_leaves_nothing_in_the_way(root: Path, log: Path, tmp_path: Path) -> None:
    dying = start(root, log, tmp_path / "go", "die")
    (tmp_path / "go").touch()
    dying.communicate(timeout=60)
    assert dying.returncode == 9
    assert compilations(log)
    second = start(root, log, tmp_path / "go")
    _, error = second.communicate(timeout=60)
    assert second.returncode == 0, error
    assert len(entries(root)) == 1


def test_the_second_time_nothing_is_compiled(ask, log: Path) -> None:
    first = ask()
    assert len(compilations(log)) == 2
    assert ask() == first
    assert len(compilations(log)) == 2
    assert first.abi == 7
    assert set(first.files) == {"a.cu", "b.cu"}


def test_sources_headers_flags_and_the_compiler_make_the_key(ask, log: Path) -> None:
    ask()
    for number, change in enumerate(
        [{"a.cu": "other"}, {"abi.h": SOURCES["abi.h"] + " "}, {"flags.txt": "--two\n"}, {"new.cuh": "header"}], 2
    ):
        ask({**SOURCES, **change})
        assert len(compilations(log)) == 2 * number, change
    ask(identity="stand-in 1.1")
    assert len(compilations(log)) == 12
    # A name is not glued to its text.
    assert cache.key_of({"ab": "c"}, (), "x") != cache.key_of({"a": "bc"}, (), "x")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:10])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize("name", ["b.cubin", "manifest.json"])
def test_a_damaged_entry_is_compiled_again(damage, name: str, ask, root: Path, log: Path) -> None:
    good = ask()
    (entry,) = entries(root)
    damage(entry / name)
    assert ask() == good
    assert len(compilations(log)) == 4
    assert ask() == good
    assert len(compilations(log)) == 4


def test_only_the_owner_gets_at_what_is_made(ask, root: Path) -> None:
    before = os.umask(0)
    try:
        ask()
    finally:
        os.umask(before)
    folders = [root, root / "hopper", *entries(root)]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) & 0o022 for file in (root / "hopper").glob("*.lock")} == {0}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(mode: int, ask, root: Path, log: Path) -> None:
    (root / "hopper").mkdir(parents=True)
    (root / "hopper").chmod(mode)
    with pytest.raises(HopperError, match=f"is refused: .*hopper has mode {mode:04o}.*VLLM_GLM_PATCH_CACHE"):
        ask()
    assert not compilations(log)


def test_a_folder_whose_parent_others_may_write_is_refused(ask, root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(HopperError, match=r"is refused: .*/cache has mode 0777"):
        ask()
    root.chmod(0o1777)  # like /tmp: others cannot put another folder in its place
    ask()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("part", ["hopper", "."])
def test_a_folder_of_somebody_else_is_refused(part: str, ask, root: Path) -> None:
    (root / "hopper").mkdir(parents=True, mode=0o700)
    os.chown(root / part, 12345, -1)
    with pytest.raises(HopperError, match="belongs to user 12345"):
        ask()


def test_a_link_is_judged_by_where_it_leads(ask, root: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    root.mkdir()
    (root / "hopper").symlink_to(tmp_path / "open")
    with pytest.raises(HopperError, match="open has mode 0777"):
        ask()


def test_a_place_that_cannot_be_written_is_named(root: Path, ask) -> None:
    root.write_text("a file, not a folder")
    with pytest.raises(HopperError, match=r"cannot be used: .*Set VLLM_GLM_PATCH_CACHE"):
        ask()


def test_a_process_that_never_ends_is_named(ask, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    folder = cache.owned_folder(root / "hopper")
    key = cache.key_of(SOURCES, (*library.flags_of(SOURCES), *library.NVRTC_FLAGS), "stand-in 1.0")
    with filelock.FileLock(folder / f"{key}.lock"), pytest.raises(HopperError, match=r"has held .*\.lock"):
        ask()


def test_what_dead_processes_left_is_swept_and_what_is_new_is_not(ask, root: Path) -> None:
    folder = cache.owned_folder(root / "hopper")
    (folder / ".new-old").mkdir()
    os.utime(folder / ".new-old", (1, 1))
    (folder / ".new-young").mkdir()
    ask()
    assert not (folder / ".new-old").exists()
    assert (folder / ".new-young").exists()


def test_the_variable_says_where(tmp_path: Path) -> None:
    assert cache.root({"VLLM_GLM_PATCH_CACHE": str(tmp_path)}) == tmp_path
    assert cache.root({"XDG_CACHE_HOME": "/there"}) == Path("/there/vllm_glm_patch")
    assert cache.root({}) == Path.home() / ".cache/vllm_glm_patch"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(HopperError, match=r"no place for compiled kernels: .* Set VLLM_GLM_PATCH_CACHE"):
        cache.root({})


def test_a_file_system_without_locks_is_named(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def no_locks(self: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    with pytest.raises(HopperError, match=r"does not appear to support flock\. Set VLLM_GLM_PATCH_CACHE"):
        ask()


def test_a_compiler_that_fails_leaves_no_entry(ask, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bytes:
        raise HopperError("the log")

    with monkeypatch.context() as broken:
        broken.setattr(SlowCompiler, "compile", refuse)
        with pytest.raises(HopperError, match="the log"):
            ask()
    assert not entries(root)
    ask()
    assert len(entries(root)) == 1
