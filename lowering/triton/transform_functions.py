"""Functions on rows of x that the text of transforms calls: groups, greatest numbers, roundings, the butterfly of Hadamard."""

from __future__ import annotations

from qcompile.lowering.triton.text import called, named

_FUNCTIONS = '''
@triton.jit
def grouped(x, SIZE: tl.constexpr):
    """The row x in groups of SIZE inputs."""
    return tl.reshape(x, (x.shape[0] // SIZE, SIZE))


@triton.jit
def flat(x):
    """Groups of inputs as one row."""
    return tl.reshape(x, (x.shape[0] * x.shape[1],))


@triton.jit
def largest(x, axis: tl.constexpr, keep: tl.constexpr):
    """max |x|; NaN, whose bits are the greatest, where there is one."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis, keep_dims=keep).to(tl.float32, bitcast=True)


@triton.jit
def larger(most, x):
    """The larger of most >= 0 and |x|; NaN where there is one."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(most.to(tl.int32, bitcast=True), bits).to(tl.float32, bitcast=True)


@triton.jit
def to_integer(x):
    """x, at most 2^22, rounded to the nearest integer, half to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_small(x, LOWEST: tl.constexpr, MANTISSA: tl.constexpr):
    """x rounded to a float of MANTISSA bits behind the point whose least normal number is 2^LOWEST, half to even."""
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (LOWEST + 127) << 23)
    unit = (power - (MANTISSA << 23)).to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - power + (MANTISSA << 23)).to(tl.float32, bitcast=True)
    return to_integer(x * inverse) * unit


@triton.jit
def machine_e4m3(x):
    """x, at most 448, as the machine rounds it to e4m3: half to even."""
    return x.to(tl.float8e4nv)


@triton.jit
def small_bits(x, LOWEST: tl.constexpr, MANTISSA: tl.constexpr):
    """The bits of x, a number of a float of eight bits."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = (size >> (23 - MANTISSA)) - ((LOWEST + 126) << MANTISSA)
    tiny = (tl.abs(x) * (2.0 ** (MANTISSA - LOWEST))).to(tl.int32)
    bits = tl.where(size < ((LOWEST + 127) << 23), tiny, normal)
    bits = tl.where(size > 0x7F800000, 0x7F, bits)
    return bits | tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)


@triton.jit
def toward_zero(x):
    """x rounded to the nearest number of e2m1, ties to the one nearer to zero."""
    size = tl.minimum(tl.abs(x), 6.0)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    rounded = tl.abs(tl.ceil(size / step - 0.5)) * step
    return tl.where(x < 0.0, -rounded, rounded)


@triton.jit
def power_of_two(x, MORE: tl.constexpr):
    """The power of two at or below x >= 0 after MORE is added to its bits."""
    return ((x.to(tl.int32, bitcast=True) + MORE) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def butterfly(x, HALF: tl.constexpr):
    """Sums and differences of neighbours at distance HALF."""
    pairs = tl.permute(tl.reshape(x, (x.shape[0] // (2 * HALF), 2, HALF)), (0, 2, 1))
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), x.shape)
'''

FUNCTIONS = named(_FUNCTIONS)


def functions(body: str) -> str:
    """The texts of all functions that `body` calls, and of those that they call."""
    return called(FUNCTIONS, body)
