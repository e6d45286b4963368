"""The Triton kernels of `conditional`; importing them needs Triton.

Programs stride over the vectors, so that there are few of them: where nothing is to be done, that is all that it takes.
"""

import triton
import triton.language as tl


@triton.jit
def overwrite(unless, new, old, count, num_each: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write `count` numbers of `old` over those of `new` if `unless` is 0."""
    if tl.load(unless) == 0:
        for begin in range(tl.program_id(0).to(tl.int64) * num_each, count, tl.num_programs(0) * num_each):
            place = begin + tl.arange(0, num_each)
            inside = place < count
            tl.store(new + place, tl.load(old + place, mask=inside), mask=inside)


@triton.jit
def multiply(vector, factor, count, num_each: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply `count` numbers by `factor` if that is not 1; so written, one that is not a number multiplies too."""
    by = tl.load(factor)
    if by != 1:
        for begin in range(tl.program_id(0).to(tl.int64) * num_each, count, tl.num_programs(0) * num_each):
            place = begin + tl.arange(0, num_each)
            inside = place < count
            tl.store(vector + place, tl.load(vector + place, mask=inside) * by, mask=inside)
