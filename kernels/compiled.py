"""
What a launch compiles to, for GPUs that are not here.

    with compiling(90) as builds:      compute capability 9.0: H100 and H200
        column_means(q, k)             tensors on the CPU; nothing is computed
    builds[0].registers                one `Build` for each launch, in order

Triton's wheel has all that this takes: the compiler, ptxas and cuobjdump. Made for Triton 3.6 and
3.7. Leave TRITON_INTERPRET unset: under it kernels become objects that cannot be compiled.
"""
import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled; leave it unset")

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
# Of a multiprocessor, by compute capability: KiB of shared memory, of which a block may have all
# but one, and resident warps.
LIMITS = {
    80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48),
}  # fmt: skip


@dataclass
class Build:
    """What a launch compiled to."""

    kernel: str
    chip: int  # compute capability
    grid: tuple
    registers: int  # of a thread, at most 255; a multiprocessor has 65536
    spilled: int  # bytes that did not fit into registers, written out and read back
    shared: int  # bytes of shared memory of a block
    fits: bool  # whether the chip has as much
    blocks: int  # that fit on a multiprocessor at once; while one waits, another works
    warps: int  # of 32 threads, in a block
    instructions: Counter  # of the machine code, by opcode
    async16: int  # asynchronous copies to shared memory, 16 bytes a thread or by a descriptor
    async_narrow: int  # the same of fewer bytes: more instructions for the same data
    sass: str  # the machine code

    def matrix(self):
        """Matrix instruction: HMMA (sm_80, sm_120), HGMMA (sm_90), UTCHMMA (sm_100), or None."""
        found = [op for op in ("UTCHMMA", "HGMMA", "HMMA") if self.instructions[op]]
        return found[0] if found else None


known = {}  # builds by Triton's hash of what was compiled, and for which chip
compile_launch = JITFunction.run  # as it is before anything replaces it


@contextlib.contextmanager
def compiling(chip):
    """Launches are compiled for this compute capability instead of run, with the arguments they
    would have run with, and the kernels are chosen for tensors on the CPU."""
    builds = []

    def build_instead(self, *args, grid, warmup=False, **options):
        builds.append(build(self, chip, grid, args, options))

    before = JITFunction.run, kernels.chip, kernels.devices
    JITFunction.run = build_instead
    kernels.chip = chip
    kernels.devices = {"cuda", "cpu"}
    try:
        with kernels.using("triton"):
            yield builds
    finally:
        JITFunction.run, kernels.chip, kernels.devices = before


def build(kernel, chip, grid, args, options):
    """The Build of one launch. The same code is taken apart once."""
    target = GPUTarget("cuda", chip, 32)
    absent = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: chip,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(absent)
    made = compile_launch(kernel, *args, grid=grid, warmup=True, **options)
    if made.hash not in known:
        known[made.hash] = take_apart(made, kernel.__name__, chip)
    return replace(known[made.hash], grid=grid)


def take_apart(made, name, chip):
    """A Build, without its grid, of what Triton made."""
    dump = ask("cuobjdump", "-res-usage", "-sass", data=made.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", dump).groups())
    spilled = 0
    if stack:  # spilled registers or a function's table: ptxas tells which
        ptxas = "ptxas-blackwell" if chip >= 100 else "ptxas"
        arch = f"--gpu-name=sm_{chip}{'a' if chip >= 90 else ''}"
        ptx = made.asm["ptx"].encode()
        log = ask(ptxas, "-v", "--regAllocOptLevel=2", arch, "-o", os.devnull, data=ptx)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    memory, most_warps = LIMITS[chip]
    shared, warps = made.metadata.shared, made.metadata.num_warps
    of_a_block = -(-registers // 8) * 8 * 32 * warps  # registers are given out by eights
    blocks = min(65536 // of_a_block, memory * 1024 // (shared + 1024), most_warps // warps)
    if columns := getattr(made.metadata, "tmem_size", 0):  # sm_100's memory for sums has 512
        blocks = min(blocks, 512 // columns)
    code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump, re.M)
    opcodes = Counter(op.split(".")[0] for op in code)
    wide = sum(op.startswith("LDGSTS") and op.endswith(".128") for op in code)
    return Build(
        name, chip, (), registers, spilled, shared, shared <= (memory - 1) * 1024, blocks, warps,
        opcodes, wide + opcodes["UTMALDG"], opcodes["LDGSTS"] - wide, dump,
    )  # fmt: skip


def ask(tool, *flags, data):
    """All that a tool of Triton's says about a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel")
        with open(path, "wb") as f:
            f.write(data)
        command = [os.path.join(TOOLS, tool), *flags, path]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr
