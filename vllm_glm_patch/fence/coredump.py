"""Reads a CUDA core dump through cuda-gdb: which kernel faulted, where, and what its registers point to."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

LANES = 32
_MARK = "@@glm-fence"
_TIMEOUT = 300  # seconds; a dump of a server takes some 20

_EXCEPTION = re.compile(r"^CUDA Exception: (.+?)\s*$", re.M)
_PC = re.compile(r"^The exception was triggered at PC (0x[0-9a-fA-F]+)", re.M)
_FOCUS = re.compile(
    r"focus (?:set )?to CUDA kernel (?P<kernel>\d+), grid (?P<grid>\d+), (?:cluster \([^)]*\), )?"
    r"block (?P<block>\([^)]*\)), thread (?P<thread>\([^)]*\)), "
    r"device (?P<device>\d+), sm (?P<sm>\d+), warp (?P<warp>\d+), lane (?P<lane>\d+)"
)
# cuda-gdb 13.0 stops at its own assertion "m_num_devices > 0" on a dump of some tens of KiB.
_NO_DEVICE = re.compile(r"m_num_devices|num_devices *> *0|no (?:CUDA )?devices? (?:found|in)", re.I)
_BROKE_OFF = re.compile(r"internal-error|Assertion .* failed|Aborted|Segmentation fault|not in executable format", re.I)
_FRAME = re.compile(r"^#0\s+(?:0x[0-9a-fA-F]+ in )?(.+)$", re.M)
_LAUNCH = re.compile(r"<<<\([\d,]+\),.*$", re.S)
_REGISTER = re.compile(r"^(U?R\d+)\s+0x([0-9a-fA-F]+)", re.M)
_INSTRUCTION = re.compile(r"^(?:=>|\*>)?\s*0x[0-9a-fA-F]+.*?:\s*(\S.*?)\s*;?$", re.M)


@dataclass(frozen=True)
class CoreDump:
    """What cuda-gdb says of a dump. Empty strings and None where it did not say.

    Attributes:
        exception: as "Warp Illegal Address".
        kernel: full name of the kernel, template arguments included, without its launch shape.
        launch: "<<<(grid),(block)>>>".
        device, sm: where it ran.
        block, thread: its place in the grid, as text.
        pc: address of the faulting instruction.
        instruction: that instruction.
        registers: a dict of register name → value for each lane of the faulting warp.
        transcript: everything cuda-gdb printed.
    """

    exception: str = ""
    kernel: str = ""
    launch: str = ""
    device: int | None = None
    sm: int | None = None
    block: str = ""
    thread: str = ""
    pc: int | None = None
    instruction: str = ""
    registers: tuple[dict[str, int], ...] = ()
    transcript: str = field(default="", repr=False)

    def addresses(self) -> list[int]:
        """Addresses that the faulting instruction reads or writes, one a lane; [] where it is not a plain access."""
        found = []
        for operand in re.findall(r"\[([^\[\]]+)\]", self.instruction)[-1:]:
            for lane in self.registers:
                address = _evaluate(operand, lane)
                if address is not None and address not in found:
                    found.append(address)
        return found

    def low_addresses(self) -> list[int]:
        """The lower 32 bits of the addresses, where the instruction overwrote the upper half, as `LDG.E R5, [R4.64]` does."""
        found = []
        for number in re.findall(r"\[R(\d+)\.64[^\[\]]*\]", self.instruction)[-1:]:
            for lane in self.registers:
                low = lane.get(f"R{number}")
                if low and low not in found:
                    found.append(low)
        return found

    def pointers(self) -> list[int]:
        """Every value that two neighbouring registers of a lane make up."""
        found: dict[int, None] = {}
        for lane in self.registers:
            for name, low in lane.items():
                kind, number = re.fullmatch(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
                high = lane.get(f"{kind}{int(number) + 1}")
                if high:
                    found[high << 32 | low] = None
        return list(found)


def _evaluate(operand: str, lane: dict[str, int]) -> int | None:
    """The address that a SASS operand such as "R10.64+UR4+0x20" stands for."""
    total = 0
    for term in operand.replace("+-", "+ -").split("+"):
        term = term.strip()
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", term):
            total += int(term, 0)
            continue
        register = re.fullmatch(r"(U?R)(\d+|Z)(\.64|\.U32)?", term)
        if not register:
            return None
        kind, number, width = register.groups()
        if number == "Z":
            continue
        low = lane.get(f"{kind}{number}")
        if low is None:
            return None
        total += low
        if width == ".64" or (kind == "UR" and width is None):
            high = lane.get(f"{kind}{int(number) + 1}")
            if high is None:
                return None
            total += high << 32
    return total


def cuda_gdb() -> str | None:
    """Path of cuda-gdb, None where there is none."""
    found = shutil.which("cuda-gdb")
    usual = Path("/usr/local/cuda/bin/cuda-gdb")
    return found or (str(usual) if usual.exists() else None)


def is_core_dump(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def commands(path: Path) -> list[str]:
    """The commands for cuda-gdb whose output `parse` reads."""
    lines = ["set width 0", f"target cudacore {path}", "bt 1", f"echo \\n{_MARK} code\\n", "x/i $errorpc"]
    for lane in range(LANES):
        lines += [f"echo \\n{_MARK} lane {lane}\\n", f"cuda lane {lane}", "info registers"]
    return lines


def read_core_dump(path: Path) -> CoreDump:
    """Runs cuda-gdb on a dump.

    Raises:
        FileNotFoundError: there is no cuda-gdb.
        RuntimeError: cuda-gdb could not open the file.
    """
    debugger = cuda_gdb()
    if debugger is None:
        raise FileNotFoundError(
            f"cuda-gdb is not on PATH, and {path} can be read with nothing else. It is part of the CUDA toolkit; "
            "copy the dump to a machine that has it and run `vllm-glm-patch diagnose` there."
        )
    arguments = [debugger, "--batch", "--nx"]
    for command in commands(path):
        arguments += ["-ex", command]
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"cuda-gdb did not finish with {path} in {_TIMEOUT} s; open it by hand.") from None
    dump = parse(done.stdout + done.stderr)
    if not dump.kernel and not dump.exception:
        raise RuntimeError(_nothing(path, dump.transcript))
    return dump


def _nothing(path: Path, transcript: str) -> str:
    """Why a dump tells nothing, and what does."""
    if _NO_DEVICE.search(transcript):
        return (
            f"{path} ({path.stat().st_size // 1024} KiB) holds no device, so the driver did not write what faulted. "
            "It was seen where several processes shared the card. Run it again with nothing else on the card, or with "
            "CUDA_LAUNCH_BLOCKING=1, which makes the traceback name the launch; a command that faults by itself can be "
            "searched with `vllm-glm-patch fence --rerun`."
        )
    said = "\n".join(transcript.strip().splitlines()[-6:])
    broken = " It broke off itself, as on a dump that is cut short." if _BROKE_OFF.search(transcript) else ""
    return f"cuda-gdb found no fault in {path} ({path.stat().st_size // 1024} KiB).{broken} It said: {said[-500:]}"


def parse(transcript: str) -> CoreDump:
    """Reads what cuda-gdb printed for `commands`."""
    head, *sections = re.split(rf"^{_MARK} ", transcript, flags=re.M)
    focus = _FOCUS.search(head)
    exception, pc, frame = _EXCEPTION.search(head), _PC.search(head), _FRAME.search(_joined(head))
    kernel = frame.group(1) if frame else ""
    launch = _LAUNCH.search(kernel)
    instruction, registers = "", []
    for section in sections:
        title, _, body = section.partition("\n")
        if title.startswith("code"):
            code = _INSTRUCTION.search(body)
            instruction = code.group(1) if code else ""
        elif title.startswith("lane"):
            lane = {name: int(value, 16) for name, value in _REGISTER.findall(body)}
            if lane:
                registers.append(lane)
    return CoreDump(
        exception=exception.group(1) if exception else "",
        kernel=_LAUNCH.sub("", kernel).strip(),
        launch=launch.group(0).split(" (")[0].strip() if launch else "",
        device=int(focus["device"]) if focus else None,
        sm=int(focus["sm"]) if focus else None,
        block=focus["block"] if focus else "",
        thread=focus["thread"] if focus else "",
        pc=int(pc.group(1), 16) if pc else None,
        instruction=instruction,
        registers=tuple(registers),
        transcript=transcript,
    )


def _joined(text: str) -> str:
    """A frame whose name is wrapped over several lines, as one line."""
    start = re.search(r"^#0 ", text, re.M)
    if not start:
        return text
    end = text.find(">>>", start.start())
    stop = text.find("\n", end if end >= 0 else start.start())
    frame = text[start.start() : stop if stop >= 0 else len(text)]
    return frame.replace("\n", "")
