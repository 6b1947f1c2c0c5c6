"""Powers inside kernels, by Triton: exponentials and sigmoids by few instructions, logarithms of sums close to one.

Triton's own `exp` and `sigmoid` take the same approximate instructions on NVIDIA's GPUs, and more beside them for
subnormal numbers, which are 0 here. `ptx` is false where those cannot be named, such as under the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(x, ptx: tl.constexpr):
    """2^x within 2e-7 of itself; 0 where that is below 2^-126."""
    if ptx:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def falling(x, ptx: tl.constexpr):
    """e^-|x| within 2e-7 x (1 + |x|) of itself; 0 where that is below 2^-126. The sign costs no instruction."""
    if ptx:
        return tl.inline_asm_elementwise(
            """{
            mul.ftz.f32 $0, $1, 0f3FB8AA3B;
            abs.f32 $0, $0;
            neg.f32 $0, $0;
            ex2.approx.ftz.f32 $0, $0;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.exp(-tl.abs(x))


@triton.jit
def sigmoid(x, ptx: tl.constexpr):
    """1 / (1 + e^-x) within 4e-7 x (1 + |x|) of itself; 0 where that is below 2^-126."""
    if ptx:
        return tl.inline_asm_elementwise(
            """{
            mul.ftz.f32 $0, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, $0;
            add.ftz.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(x)


@triton.jit
def log_of_one_more(more, ptx: tl.constexpr):
    """log(1 + more) for 0 <= more < 2^24, within 4e-7 of itself; below 1 a polynomial of more / (2 + more)."""
    half = more / (2 + more)
    z = half * half
    series = 0.140788892 * z + 0.139825789
    series = series * z + 0.200122976
    series = series * z + 0.333331608
    series = series * z + 1.000000004
    return tl.where(more < 1, 2 * half * series, _logarithm(1 + more, ptx))


@triton.jit
def _logarithm(x, ptx: tl.constexpr):
    """log(x) for x >= 2."""
    if ptx:
        return tl.inline_asm_elementwise(
            """{
            lg2.approx.ftz.f32 $0, $1;
            mul.ftz.f32 $0, $0, 0f3F317218;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.log(x)
