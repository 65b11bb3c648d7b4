"""`fence -- COMMAND`: runs a command with the fence in all its Python processes, and reports faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from . import dumping
from .journal import read_journal
from .launches import Watch, launch_records, watches
from .library import FenceError, library_path
from .options import Options, core_path
from .report import FaultReport, core_dumps, faulted, only_in_log, process_of, processes, report_process
from .rerun import search_size
from .xid import KernelLog

HOOK = Path(__file__).with_name("hook")
_FAULT_TEXTS = ("an illegal memory access was encountered", "CUDA_ERROR_ILLEGAL_ADDRESS")
_WITHOUT_DUMP = (
    "what faulted could not be read from the core dump. Run it again with --launches, which names the kernel without one. A "
    "command that faults by itself can also be searched with --rerun; for a server set CUDA_LAUNCH_BLOCKING=1 and send it the "
    "same requests: the traceback in its log then names the launch."
)
_UNFENCED = (
    "it allocated nothing under the fence, so its launches were not watched. Lines that begin with `fence:` or `vllm-glm-patch "
    "fence:` above say whether the fence could not be installed in it."
)
_SETTLED = 10.0  # seconds without growth: a core dump that is not whole will not become so
# A core dump with registers, code and kernel parameters, but without the card's memory: megabytes, not 80 GB.
_DUMP_FLAGS = "skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory,skip_local_memory"


def environment(options: Options, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`base` and what makes a child process run under the fence; `options.directory` must be set."""
    result = {**base, **options.to_environment()}
    python_path = [str(HOOK), *filter(None, [base.get("PYTHONPATH", "")])]
    result["PYTHONPATH"] = os.pathsep.join(python_path)
    # Not both: a server that faulted in a launch that was waited for hung where the driver also began a dump (H100).
    result["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] = "0" if options.launches else "1"
    result["CUDA_COREDUMP_FILE"] = str(core_path(options.directory, "%p"))
    result.setdefault("CUDA_COREDUMP_GENERATION_FLAGS", _DUMP_FLAGS)
    result.setdefault("CUDA_COREDUMP_SHOW_PROGRESS", "1")  # the driver then says where a dump stops
    return result


def run(command: list[str], options: Options | None = None, rerun: bool = False) -> int:
    """Runs `command` under the fence; standard output and error are its own, reports go to standard error.

    Args:
        command: program and arguments.
        options: a directory of its own is made where they name none; it is kept if there was a fault.
        rerun: where nothing names the kernel, find the block by running the command again
            (see rerun.py).

    Returns:
        The command's exit code (128 + signal where a signal ended it), but 1 where it ended with 0 after a fault.

    Raises:
        FenceError: the fence's library is missing.
        FileNotFoundError: there is no such command.
    """
    options = options or Options()
    if not library_path(options).exists():
        raise FenceError(f"{library_path(options)} is missing; reinstall vllm-glm-patch from its wheel.")
    own_directory = not options.directory
    if not own_directory:
        Path(options.directory).mkdir(parents=True, exist_ok=True)
    else:
        options = replace(options, directory=tempfile.mkdtemp(prefix="glm-fence-"))
    options = replace(options, directory=str(Path(options.directory).resolve()))
    directory = Path(options.directory)
    before = set(watches(directory))
    code, reports = _run_and_watch(command, environment(options), directory)
    watched = {pid: watch for pid, watch in watches(directory).items() if pid not in before}
    if reports:
        (directory / "report.json").write_text(json.dumps([one.as_dict() for one in reports], indent=2) + "\n")
        print(f"fence: report, core dumps and lists of blocks are in {directory}", file=sys.stderr)
    elif own_directory:
        shutil.rmtree(directory, ignore_errors=True)
    unread = [one for one in reports if not one.kernel]
    if unread and rerun:
        _find_by_rerun(command, options, unread[0])
    elif unread and not options.launches:
        print("fence: " + _WITHOUT_DUMP, file=sys.stderr)
    elif unread:
        _advise({one.pid: watched.get(one.pid) for one in unread})
    elif code and not reports:  # whatever it ended by, no launch can have been blamed
        _advise({pid: watch for pid, watch in watched.items() if watch.problem})
    return code or int(bool(reports))


def _advise(processes: Mapping[int, Watch | None]) -> None:
    """The next step for processes of which --launches told nothing; once where it is the same for several."""
    said = set()
    for pid, watch in processes.items():
        text = watch.advice() if watch else _UNFENCED
        if text not in said:
            print(f"fence: process {pid}: {text}", file=sys.stderr)
        said.add(text)


def _run_and_watch(command: list[str], env: dict[str, str], directory: Path) -> tuple[int, list[FaultReport]]:
    """Runs the command; reports each fault as soon as its dump is complete, as a server may go on without its engine."""
    before = {*faulted(directory), *processes(directory)}
    log = KernelLog()
    reported: dict[int, FaultReport] = {}
    grown: dict[Path, tuple[int, float]] = {}
    with subprocess.Popen(command, env=env) as child:
        # The terminal sends SIGINT to the child itself; SIGTERM comes to us alone and is handed on.
        old_int = signal.signal(signal.SIGINT, lambda *_: None)
        old_term = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                try:
                    code = child.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    code = None
                waiting = False
                launches = launch_records(directory)
                records = set(launches.values())
                files = {**launches, **{process_of(core): core for core in core_dumps(directory)}}
                for pid, file in files.items():
                    if pid in before or pid in reported:
                        continue
                    size = file.stat().st_size
                    if grown.get(file, (-1, 0.0))[0] != size:
                        grown[file] = (size, time.monotonic())
                    # A process that is gone begins no dump any more.
                    patience = min(_SETTLED, 2) if code is not None and file in records else _SETTLED
                    if not dumping.complete(file) and time.monotonic() - grown[file][1] < patience:
                        waiting = True
                        continue
                    reported[pid] = _told(report_process(directory, pid, log))
                if code is not None and not waiting:
                    break
                if code is not None:
                    time.sleep(1)
            for pid in only_in_log(directory, log, before):
                reported[pid] = _told(report_process(directory, pid, log))
        finally:
            log.close()
            signal.signal(signal.SIGINT, old_int)
            signal.signal(signal.SIGTERM, old_term)
    return (128 - code if code < 0 else code), list(reported.values())


def _told(fault: FaultReport) -> FaultReport:
    print(fault.text(), file=sys.stderr, flush=True)
    return fault


def _find_by_rerun(command: list[str], options: Options, fault: FaultReport) -> None:
    """Says which size of block is run past, from reruns with launch blocking; their output goes to files."""
    directory = Path(options.directory)
    try:
        journal = read_journal(directory / f"blocks-{fault.pid}.bin")
    except (OSError, ValueError) as error:
        print(f"fence: no search by rerun: {error}", file=sys.stderr)
        return
    runs = 0

    def faults(low: int, high: int) -> bool:
        nonlocal runs
        runs += 1
        where = directory / f"rerun-{runs}"
        where.mkdir()
        env = environment(replace(options, directory=str(where), only=(low, high)))
        env.update(CUDA_LAUNCH_BLOCKING="1", CUDA_ENABLE_COREDUMP_ON_EXCEPTION="0")
        log = where / "output.log"
        with log.open("w") as out:
            code = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        text = log.read_text(errors="replace")
        hit = code != 0 and any(sign in text for sign in _FAULT_TEXTS)
        print(f"fence: rerun {runs}: blocks of {low} to {high} bytes: {'fault' if hit else 'no fault'}", file=sys.stderr)
        return hit

    low, high = search_size([row.size for row in journal.rows if row.live], faults)
    print(
        f"fence: the block has {low} bytes." if low == high else f"fence: the block has between {low} and {high} bytes.",
        f"The last rerun that faulted has the failing launch in its traceback: {directory}/rerun-*/output.log",
        file=sys.stderr,
    )
