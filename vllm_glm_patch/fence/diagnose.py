"""Says which known defect a vLLM log or a CUDA core dump shows, or that none does."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coredump import is_core_dump, read_core_dump

# What a log calls the exceptions that a core dump names.
_LOG_TEXT = {
    "Warp Illegal Address": "CUDA error: an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS)",
    "Warp MMU Fault": "CUDA error: an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS)",
    "Warp Misaligned Address": "CUDA error: misaligned address",
    "Warp Illegal Instruction": "CUDA error: an illegal instruction was encountered",
    "Warp Assert": "CUDA error: device-side assert triggered",
}
# One a line of a log, whatever the logger put before it; the formats are those of vLLM 0.10.0 to 0.33.0.
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TOTAL = re.compile(r"total_num_scheduled_tokens\\?[\"']?[=:]\s*(\d+)")
_EACH = re.compile(r"(?<!total_)num_scheduled_tokens\\?[\"']?[=:]\s*\{([^{}]*)\}")
_COUNT = re.compile(r":\s*(\d+)\s*(?:,|$)")
_VERSION = re.compile(
    r"(?:vLLM (?:API )?server version|LLM engine \(v|vllm version[ =:]+|[█▀▄] +version|vllm==|^vllm(?:-cpu)? +)"
    r"\s*v?(\d+\.\d+\.\d+(?:\.?[A-Za-z]+\d*|\.\d+)*(?:\+[\w.]+)?)",
    re.I,
)
_ERROR = re.compile(
    r"(?:CUDA|Cuda) (?:runtime |driver )?error:? [^\n]+|Triton Error \[CUDA\][^\n]*|CUDA_ERROR_\w+[^\n]*|cudaError\w+[^\n]*|"
    r"CUDA out of memory[^\n]*|Failed to initialize the TMA descriptor[^\n]*|CUDA Exception: [^\n]+"
)
_ERROR_LINE = re.compile(r"[^\n]*(?:an illegal memory access was encountered|device-side assert|Assertion `[^\n]*failed)[^\n]*")
_KERNEL = re.compile(r"coredump:\s+#0\s+0x[0-9a-f]+\s+(\S+)|The exception was triggered at PC 0x[0-9a-f]+\s+(.+)")
# A line of report.py's FaultReport.text.
_FENCE_KERNEL = re.compile(r"^  kernel {7}(?!unknown$|one in a CUDA graph)(\S.*?)(?: <<<.*>>>)?$")
_PATCH = re.compile(r"\b([a-z]+(?:-[a-z]+)+) {2,}(applied|not needed|switched off|refused|not in this release)\b")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


MATCH, POSSIBLE = "match", "possible"


@dataclass(frozen=True)
class Signature:
    """How a defect shows. Empty or 0: not part of the signature.

    Attributes:
        patch: id of the defect in the catalog.
        error: regular expression, searched in the error text.
        kernel: regular expression, searched in the name of the faulting kernel.
        tokens_multiple_of: the step's token count is a multiple of it.
        why: a sentence on why these signs mean this defect.
        settle: what would settle it where not every part was seen.
    """

    patch: str
    error: str = ""
    kernel: str = ""
    tokens_multiple_of: int = 0
    why: str = ""
    settle: str = ""

    @classmethod
    def from_table(cls, patch: str, table: Mapping[str, Any]) -> Signature:
        """From a `[[signature]]` table of patches/*.toml.

        Raises:
            ValueError: an unknown key, a wrong type or a regular expression that does not compile.
        """
        known = {"error": str, "kernel": str, "tokens_multiple_of": int, "why": str, "settle": str}
        for key, value in table.items():
            if key not in known:
                raise ValueError(f"patch {patch}: signature has {key!r}; known keys are {', '.join(known)}.")
            if not isinstance(value, known[key]):
                raise ValueError(f"patch {patch}: signature {key} is {value!r}; it must be {known[key].__name__}.")
            if key in ("error", "kernel"):
                _check_expression(patch, key, str(value))
        return cls(patch, **table)


def _check_expression(patch: str, key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"patch {patch}: signature {key} {expression!r} does not compile: {error}.") from None


@dataclass(frozen=True)
class Evidence:
    """What the file says. Empty where it says nothing.

    Attributes:
        errors: error texts, in the order in which they appear.
        kernels: names of faulting kernels.
        tokens: token counts of dumped scheduler outputs; the last is that of the step that died.
        version: of vLLM, the last one that is named.
        patches: (id, state) as this package's own table in the log has them; () where there is none.
        surfaced: "file:line in function", the innermost frame of the first traceback that ends in such an error.
    """

    errors: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    version: str = ""
    patches: tuple[tuple[str, str], ...] = ()
    surfaced: str = ""


@dataclass(frozen=True)
class Match:
    """A signature that fits.

    Attributes:
        signature: the signature.
        certain: every part of it was seen; else `unseen` names those that the file does not tell.
        unseen: as ("kernel", "tokens").
    """

    signature: Signature
    certain: bool
    unseen: tuple[str, ...] = ()

    @property
    def grade(self) -> str:
        """MATCH, or POSSIBLE: what is in the file fits, and does not tell this defect from others."""
        return MATCH if self.certain else POSSIBLE


@dataclass(frozen=True)
class Diagnosis:
    """The answer.

    Attributes:
        path: the file.
        evidence: what it says.
        matches: defects that fit, certain ones first; empty: none is known that does.
    """

    path: Path
    evidence: Evidence
    matches: tuple[Match, ...]

    def text(self) -> str:
        """The answer for a person."""
        seen = self.evidence
        lines = [
            f"{self.path}",
            f"  vLLM    {seen.version or 'version not found'}",
            f"  error   {seen.errors[0] if seen.errors else 'no CUDA error found'}",
            f"  kernel  {seen.kernels[0] if seen.kernels else 'not named'}",
            f"  tokens  {seen.tokens[-1] if seen.tokens else 'no dumped scheduler output'}",
        ]
        if seen.patches:
            lines.append("  patches " + ", ".join(f"{patch} {state}" for patch, state in seen.patches))
        for match in self.matches:
            how = "matches" if match.certain else f"{match.grade} (not in this file: {', '.join(match.unseen)})"
            settle = f" To settle it: {match.signature.settle}." if match.signature.settle and not match.certain else ""
            why = f" {match.signature.why.rstrip('.')}." if match.signature.why else ""
            lines.append(f"{how}: {match.signature.patch}.{why}{settle}")
        if not self.matches:
            lines.append("No known defect matches.")
        if not seen.kernels and seen.errors:
            where = f" It surfaced in {seen.surfaced}, which need not be to blame." if seen.surfaced else ""
            lines.append(
                f"CUDA errors surface at a later call, so the log's traceback does not name the kernel.{where} "
                "`vllm-glm-patch fence -- COMMAND` does."
            )
        return "\n".join(lines)


def diagnose(path: Path, signatures: Iterable[Signature]) -> Diagnosis:
    """Compares a file with the known defects.

    Args:
        path: a vLLM log, or a CUDA core dump (recognised by its content).
        signatures: of the catalog.

    Raises:
        OSError: the file cannot be read.
        FileNotFoundError: it is a core dump and there is no cuda-gdb.
        RuntimeError: cuda-gdb cannot open it.
    """
    evidence = read_dump_evidence(path) if is_core_dump(path) else read_lines(_lines(path))
    found = [match for signature in signatures if (match := match_signature(signature, evidence))]
    best: dict[str, Match] = {}  # one a defect
    for match in sorted(found, key=lambda match: not match.certain):
        best.setdefault(match.signature.patch, match)
    return Diagnosis(path, evidence, tuple(best.values()))


def read_dump_evidence(path: Path) -> Evidence:
    dump = read_core_dump(path)
    name = dump.exception
    errors = (f"{name}: {_LOG_TEXT[name]}" if name in _LOG_TEXT else name,) if name else ()
    return Evidence(errors=errors, kernels=(dump.kernel,) if dump.kernel else ())


def read_log(text: str) -> Evidence:
    """What the text of a vLLM log says of its death."""
    return read_lines(text.splitlines())


def read_lines(lines: Iterable[str]) -> Evidence:
    """The same line by line, since the log of a server can be larger than memory."""
    errors: dict[str, None] = {}
    kernels: dict[str, None] = {}
    patches: dict[str, str] = {}
    tokens: list[int] = []
    version = frame = surfaced = ""
    for raw in lines:
        line = _ANSI.sub("", raw)
        if found := _VERSION.search(line):
            version = found.group(1)
        tokens += _tokens(line)
        patches.update(_PATCH.findall(line))
        if named := _KERNEL.search(line):
            kernels[(named.group(1) or named.group(2)).strip()] = None
        elif told := _FENCE_KERNEL.match(line.rstrip()):
            kernels[told.group(1)] = None
        if frames := _FRAME.findall(line):
            file, number, function = frames[-1]
            frame = f"{file}:{number} in {function}"
        for error in _ERROR.findall(line) or _ERROR_LINE.findall(line):
            errors[_one_error(error)] = None
            surfaced = surfaced or frame
    return Evidence(tuple(errors), tuple(kernels), tuple(tokens), version, tuple(patches.items()), surfaced)


def _tokens(line: str) -> list[int]:
    """Token counts of the scheduler outputs dumped in a line; from those of the requests where the line is cut short."""
    totals = [int(count) for count in _TOTAL.findall(line)]
    if totals:
        return totals
    return [sum(map(int, counts)) for each in _EACH.findall(line) if (counts := _COUNT.findall(each))]


def _one_error(text: str) -> str:
    """An error's first line, also where a log in JSON has several in one string."""
    return re.split(r"\\n|\",", text)[0].strip()[:500]


def _lines(path: Path) -> Iterable[str]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rt", errors="replace") if packed else path.open(errors="replace") as text:
        yield from text


def match_signature(signature: Signature, evidence: Evidence) -> Match | None:
    """None where any part of the signature is contradicted, or where no error is seen at all."""
    if not evidence.errors:
        return None
    if signature.error and not any(re.search(signature.error, error) for error in evidence.errors):
        return None
    unseen = []
    if signature.kernel:
        if not evidence.kernels:
            unseen.append("kernel")
        elif not any(re.search(signature.kernel, kernel) for kernel in evidence.kernels):
            return None
    if signature.tokens_multiple_of:
        if not evidence.tokens:
            unseen.append("tokens")
        elif evidence.tokens[-1] % signature.tokens_multiple_of:
            return None
    return Match(signature, not unseen, tuple(unseen))
