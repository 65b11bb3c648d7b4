"""Reads the list of blocks that the allocator leaves in a file: which block does an address lie behind?"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("<8sIIQQIIQQQ")
_ROW = struct.Struct("<QQQQQQiIII")
_LIVE = 1


@dataclass(frozen=True)
class Row:
    """A block. Addresses are the device's; `size` is what was asked for, in bytes."""

    address: int
    size: int
    mapped_begin: int
    mapped_end: int
    stream: int
    sequence: int
    device: int
    state: int
    stack: int
    in_graph_pool: int

    @property
    def live(self) -> bool:
        return self.state == _LIVE


@dataclass(frozen=True)
class Place:
    """Where an address lies: `where` says it of `row`, and `distance` is in bytes from the edge that was crossed."""

    address: int
    row: Row
    where: str  # "past the end", "before the start", "inside", "in freed memory"
    distance: int


@dataclass(frozen=True)
class Journal:
    """What a process had allocated.

    Attributes:
        pid: the process.
        granularity: bytes of a page of the device; a guard is one page.
        align: bytes; blocks were rounded up to it.
        guard_before: the guard is before the block, not behind it.
        rows: live and freed blocks.
    """

    pid: int
    granularity: int
    align: int
    guard_before: bool
    rows: tuple[Row, ...]

    def locate(self, address: int) -> Place | None:
        """The block that `address` belongs to, ran past, or belonged to; live blocks first, then the newest."""
        places = [place for row in self.rows if (place := self._place(row, address))]
        return min(places, key=lambda place: (not place.row.live, -place.row.sequence), default=None)

    def _place(self, row: Row, address: int) -> Place | None:
        begin = row.mapped_begin - (self.granularity if self.guard_before else 0)
        end = row.mapped_end + (0 if self.guard_before else self.granularity)
        if not begin <= address < end:
            return None
        # Past a freed block's own pages the address says that the block was run past, whenever it was freed.
        if not row.live and row.mapped_begin <= address < row.mapped_end:
            return Place(address, row, "in freed memory", address - row.address)
        if address >= row.address + row.size:
            return Place(address, row, "past the end", address - row.address - row.size)
        if address < row.address:
            return Place(address, row, "before the start", row.address - address)
        return Place(address, row, "inside", address - row.address)

    def behind(self, low: int) -> list[int]:
        """The addresses with these lower 32 bits that lie in the guard of a block listed here."""
        found = []
        for row in self.rows:
            guard = row.mapped_begin - self.granularity if self.guard_before else row.mapped_end
            address = guard + (low - guard) % 2**32
            if address < guard + self.granularity:
                found.append(address)
        return found

    def is_guard(self, address: int) -> bool:
        """Does `address` lie in an unmapped page that belongs to a block listed here?"""
        place = self.locate(address)
        if place is None:
            return False
        return not place.row.live or not place.row.mapped_begin <= address < place.row.mapped_end


def read_journal(path: Path) -> Journal:
    """Reads a journal; it may be of a process that has died.

    Raises:
        ValueError: `path` is not a journal of the fence.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.size or data[:8] != b"GLMFENCE":
        raise ValueError(f"{path} is no journal of the fence; a journal is named blocks-PID.bin.")
    _, version, slots, pid, granularity, align, guard_before, *_ = _HEADER.unpack_from(data)
    if version != 1:
        raise ValueError(f"{path} has version {version}, this release reads 1; read it with the release that wrote it.")
    rows = []
    for offset in range(_HEADER.size, _HEADER.size + slots * _ROW.size, _ROW.size):
        if offset + _ROW.size > len(data):
            break
        row = Row(*_ROW.unpack_from(data, offset))
        if row.address == 0:  # rows are taken in order: the rest is unused
            break
        rows.append(row)
    return Journal(pid, granularity, align, bool(guard_before), tuple(rows))
