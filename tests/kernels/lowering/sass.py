"""Compile a Triton or Gluon kernel for a GPU that need not be there, and read facts off its SASS.

    code = lower(kernel, {"x_ptr": "*bf16", "M": "i32"}, {"BLOCK_M": 16}, num_warps=4)
    assert code.stack == 0 and code.count("STS") == 0
    assert code.per_weight(block_n * block_k) < 2.5

Everything but `registers`, `stack` and `shared` is about the main loop: the innermost loop with the
most matrix instructions, or the longest innermost one where a kernel has none; and about all of a
kernel that does not loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_MATRIX = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA", "OMMA", "QMMA")


_DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
_DTYPES |= {"i8": gl.int8, "u8": gl.uint8, "i32": gl.int32}


def descriptor(block: list[int], dtype: str) -> str:
    """The type of a Gluon tensor descriptor with its default layout, for a signature of lower()."""
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


@dataclass(frozen=True)
class Lowered:
    """What one kernel became.

    Fields:
        opcodes: full opcodes of the main loop with their counts, `LDS.128` apart from `LDS`.
        registers, stack: per thread; a stack above 0 is a spill.
        shared: bytes per program.
        threads: per program.
        text: the whole SASS listing.
        ptx: what the assembler was given.
    """

    opcodes: Counter[str]
    registers: int
    stack: int
    shared: int
    threads: int
    text: str
    ptx: str

    @property
    def instructions(self) -> int:
        """Instructions of the main loop, per thread."""
        return sum(self.opcodes.values())

    def count(self, *names: str) -> int:
        """Main-loop instructions by name: `STS` counts STS.128 too, `LDS.128` only itself."""
        return sum(
            n
            for opcode, n in self.opcodes.items()
            if any(opcode == name or opcode.startswith(name + ".") for name in names)
        )

    @property
    def matrix(self) -> frozenset[str]:
        """The base names of the main loop's matrix instructions: HMMA, HGMMA, IMMA, ..."""
        return frozenset(o.split(".")[0] for o in self.opcodes if o.split(".")[0] in _MATRIX)

    def per_weight(self, weights: int) -> float:
        """Instructions per weight and thread, for a main loop that takes `weights` a program."""
        return self.instructions * self.threads / weights

    def __str__(self) -> str:
        shown = ("LDGSTS", "LDG", "LDS", "LDSM", "STS", "BAR", "LOP3", "SHF", "PRMT", "IMAD")
        shown += ("HFMA2", "HADD2", "HMUL2", "FFMA", "FMUL", "F2F", "I2F", "WARPGROUP", *_MATRIX)
        counts = " ".join(f"{name}:{self.count(name)}" for name in shown if self.count(name))
        return (
            f"{self.instructions} instructions, {self.registers} registers, stack {self.stack}, "
            f"shared {self.shared}; {counts}"
        )


def lower(
    kernel,
    signature: dict[str, str],
    constants: dict[str, object],
    num_warps: int = 4,
    num_stages: int = 3,
    capability: int = 90,
    unaligned: tuple[str, ...] = (),
    **options,
) -> Lowered:
    """Compile `kernel` for compute capability `capability` and read its machine code.

    Args:
        signature: type of each argument that is no constant: `*bf16`, `*i32`, `i32`, ..., and
            `tensordesc<bf16[64, 128]>`, which in Gluon names its layout too.
        constants: constexpr arguments, and arguments specialised to a value (None, 1).
        unaligned: arguments not known to be multiples of 16, as pointers and strides mostly are.
        options: further launch options, such as maxnreg.
    """
    types = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in unaligned
    }
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, **options),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        text = _run(_BIN / "cuobjdump", "-sass", cubin.name)
        usage = re.search(
            r"REG:(\d+) STACK:(\d+)", _run(_BIN / "cuobjdump", "-res-usage", cubin.name)
        )
    assert usage is not None, "cuobjdump printed no resource usage"
    # 3.8 and later name the launched warps apart, as warp specialisation adds some
    warps = getattr(built.metadata, "num_warps", num_warps)
    return Lowered(
        opcodes=_main_loop(text),
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=built.metadata.shared,
        threads=32 * warps,
        text=text,
        ptx=built.asm["ptx"],
    )


def messages(code: Lowered) -> str:
    """What ptxas has to say about the kernel: its `-v` output."""
    # sm_90a and the like, which wgmma needs
    target = re.search(r"^\.target (\w+)", code.ptx, re.MULTILINE)
    assert target is not None, "PTX without a target"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(code.ptx)
        ptx.flush()
        # newer releases bring several assemblers
        ptxas = get_ptxas(int(target[1].removeprefix("sm_").rstrip("af"))).path
        return _run(ptxas, "-v", f"--gpu-name={target[1]}", ptx.name, "-o", "/dev/null")


def _run(tool: str | Path, *args: str) -> str:
    done = subprocess.run([tool, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _main_loop(text: str) -> Counter[str]:
    code = [(int(at, 16), opcode, rest) for at, opcode, rest in _INSTRUCTION.findall(text)]
    loops = []
    for at, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        # a branch to itself is the trap after EXIT
        if opcode.startswith("BRA") and target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inner = [
        (a, b)
        for a, b in loops
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    ]
    bodies = [Counter(opcode for at, opcode, _ in code if a <= at <= b) for a, b in inner]

    def weight(body: Counter[str]) -> tuple[int, int]:
        matrix = sum(n for opcode, n in body.items() if opcode.split(".")[0] in _MATRIX)
        return matrix, sum(body.values())

    return max(bodies, key=weight) if bodies else Counter(opcode for _, opcode, _ in code)
