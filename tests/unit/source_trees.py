"""Small trees and packages that look to `scan` like a vLLM: a few lines of our own with the tokens its rules look for."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

EPILOGUE = "csrc/some/place/broadcast_load_epilogue_array_c3x.hpp"
PERMUTE = "csrc/moe/moe_permute_unpermute_op.cu"
PERMUTE_KERNEL = "csrc/moe/kernels/moe_permute_unpermute_kernel.cu"
CUTLASS_MOE = "vllm/model_executor/layers/fused_moe/cutlass_moe.py"

WRONG_EPILOGUE = "void begin() {\n  copy_if(pred, filter(tCgCol), filter(mine));\n}\n"
RIGHT_EPILOGUE = "void begin() {\n  pred(i) = get<0>(place(i)) < m;\n  copy_if(pred, from, to);\n}\n"
UNGUARDED = "void permute() {\n  if (expert_map.has_value()) {\n    preprocessTopkIdLauncher(ids);\n  }\n}\n"
ALWAYS_PREPARED = "void permute() {\n  preprocessTopkIdLauncher(ids);\n}\n"
GUARDED_KERNEL = "void prepare() { if (topk_id < 0 || topk_id >= num_experts) last(); }\n"

WRONG = {EPILOGUE: WRONG_EPILOGUE, PERMUTE: UNGUARDED, PERMUTE_KERNEL: "void prepare() {}\n"}
RIGHT = {EPILOGUE: RIGHT_EPILOGUE, PERMUTE: ALWAYS_PREPARED, PERMUTE_KERNEL: GUARDED_KERNEL}
EXPLODES = {"vllm/__init__.py": 'raise RuntimeError("a scan must not import this")\n'}


def metadata(version: str, name: str = "vllm") -> str:
    return f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n\nVersion: of the description, not ours\n"


def source(files: dict[str, str], version: str | None = None) -> dict[str, str]:
    """The files of a source tree."""
    return {**EXPLODES, **files, **({"PKG-INFO": metadata(version)} if version else {})}


def package(files: dict[str, str], version: str) -> dict[str, str]:
    """The files of an installed vLLM, or of a wheel."""
    return {**EXPLODES, **files, f"vllm-{version}.dist-info/METADATA": metadata(version)}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def write_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def write_sdist(path: Path, files: dict[str, str], top: str = "vllm-0.0.0") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path
