"""What cuda-gdb prints for fence/coredump.py's commands. The shape is cuda-gdb 13's; addresses are filled in by tests."""

KERNEL = (
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<cute::tuple<int,"
    " int, int> >, cutlass::gemm::collective::CollectiveMma<4> > >(Params)"
)

_HEAD = """Opening GPU coredump: /tmp/f/core-77.nvcudmp
[Current focus set to CUDA kernel 0, grid 91, cluster (3,0,0), block (7,1,0), \
thread (128,0,0), device 0, sm 12, warp 4, lane 0]

CUDA Exception: Warp Illegal Address
The exception was triggered at PC 0x7f31abb9f6d0  void cutlass::device_kernel<...>
#0  0x00007f31abb9f6e0 in {kernel}<<<(132,1,1),(384,1,1)>>> ()
#0  0x00007f31abb9f6e0 in {kernel}<<<(132,1,1),(384,1,1)>>> ()

@@glm-fence code
=> 0x7f31abb9f6d0 <_ZN7cutlass13device_kernel+5840>:\t{instruction}
"""

_LANE = """
@@glm-fence lane {lane}
[Switching focus to CUDA kernel 0, grid 91, cluster (3,0,0), block (7,1,0), \
thread ({thread},0,0), device 0, sm 12, warp 4, lane {lane}]
R0             0x1                 1
R1             0xfffdf8            16776696
R10            {low:#x}          {low}
R11            {high:#x}              {high}
UR4            0x0                 0
"""


def transcript(addresses: list[int], instruction: str = "LDG.E R5, [R10.64+0x20]", kernel: str = KERNEL) -> str:
    """`addresses`: what R10 and R11 hold in each lane."""
    lanes = [
        _LANE.format(lane=lane, thread=128 + lane, low=address & 0xFFFFFFFF, high=address >> 32)
        for lane, address in enumerate(addresses)
    ]
    return _HEAD.format(kernel=kernel, instruction=instruction) + "".join(lanes)


# What csrc/fence/launches.cpp writes.
RECORD = {
    "pid": 77, "thread": 78, "function": "cuLaunchKernel", "symbol": "_Z10reads_pastPf", "kernel": "reads_past(float*)",
    "shape": "<<<(1,1,1),(32,1,1)>>>", "graph": False, "index": 9, "result": 700, "error": "CUDA_ERROR_ILLEGAL_ADDRESS",
    "found": "synchronize", "concurrent": 0, "stack": 0, "parameters_read": True, "candidates": [],
}  # fmt: skip
