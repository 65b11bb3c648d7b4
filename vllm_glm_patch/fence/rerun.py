"""Finds the block by running the command again and again, where no debugger can read a core dump.

Only blocks of some sizes touch their guard in each run; the others end a little before it. If the fault stays, the
block is among those sizes. About log2(number of different sizes) runs, each of the whole command: of use for a command
that faults by itself, not for a server that waits for requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def search_size(sizes: Sequence[int], faults: Callable[[int, int], bool]) -> tuple[int, int]:
    """Narrows down which size of block is run past.

    Args:
        sizes: sizes of the blocks that were live at the fault, in bytes.
        faults: runs the command with only blocks of low <= bytes <= high fenced tightly; did it fault?

    Returns:
        (low, high), equal where one size is found. The whole range where the fault did not come again.
    """
    ordered = sorted(set(sizes))
    if not ordered:
        return (0, 0)
    low, high = 0, len(ordered) - 1
    while low < high:
        middle = (low + high) // 2
        if faults(ordered[low], ordered[middle]):
            high = middle
        elif faults(ordered[middle + 1], ordered[high]):
            low = middle + 1
        else:  # needs both halves, or is not the same from run to run
            break
    return ordered[low], ordered[high]
