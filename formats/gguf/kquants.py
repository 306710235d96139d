"""The block formats of GGUF: what the bytes of a quantised tensor mean, and how llama.cpp chooses them.

A row is split into blocks, each with its own scale; the functions below define a block's layout in memory (which one
belongs to which type of tensor is in formats/gguf/types.py). The K-formats put
eight or sixteen groups, whose scales are themselves quantised, into a block of 256 values. The byte layouts are those
of ggml/src/ggml-common.h, and the quantisers give, byte for byte, what `quantize_row_*_ref` of ggml/src/ggml-quants.c
give (there, as here, without an importance matrix). That only holds because this file rounds where the C code rounds:
every product and sum is a float32 of its own, never fused, and sums run from the first value to the last
(`ordered_sum`). convert.py uses ops/cpu/pack.cpp, which does the same, and this file where there is no C++ compiler.

Inside, a tile of blocks is transposed so that the values of a group run along dimension 0 and the groups along the last
one: each step is then one operation over long vectors.
"""

import numpy as np
import torch

SMALLEST = 1e-15  # GROUP_MAX_EPS: a Q6_K group below it is all zero


# ---- what the formats share --------------------------------------------------------------------------------------


def ordered_sum(terms: torch.Tensor) -> torch.Tensor:
    """The sum over dimension 0 from the first row to the last, each step rounded to float32, as a loop in C rounds it.

    torch.sum adds in several strands. NumPy adds whole rows in order when the reduced axis is not the innermost one.
    """
    with np.errstate(all="ignore"):  # what is not finite is found in the scales
        return torch.from_numpy(np.add.reduce(terms.numpy(), axis=0))


def half(values: torch.Tensor) -> torch.Tensor:
    """float32 [blocks] -> the two bytes [blocks, 2] of each as float16."""
    halves = values.to(torch.float16)
    if not halves.isfinite().all():
        raise ValueError("a value is not finite or too large for the float16 scale of a block")
    return halves.unsqueeze(-1).contiguous().view(torch.uint8)


def from_half(data: torch.Tensor) -> torch.Tensor:
    """bytes [blocks, 2n] -> float32 [blocks, n]."""
    return data.contiguous().view(torch.float16).float()


def nibbles(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower and the upper four bits of each byte."""
    return data & 15, data >> 4


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The nearest whole numbers (int32), ties to even; beyond 2^22 what nearest_int of ggml-quants.c makes of them."""
    return (values + 1.5 * 2**23).view(torch.int32).bitwise_and_(0x7FFFFF).sub_(0x400000)


def inverse(values: torch.Tensor) -> torch.Tensor:
    """1/value, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)


def ratio(number: float, values: torch.Tensor) -> torch.Tensor:
    """number / values with one rounding; `number / tensor` would be number times the rounded reciprocal."""
    return torch.tensor(number, dtype=torch.float32) / values


def square_root(values: torch.Tensor) -> torch.Tensor:
    """The correctly rounded root, which torch's float32 root is not always."""
    return values.double().sqrt_().float()


def of_largest_magnitude(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The value (with its sign) of the largest magnitude, the first of equal ones; 0 for -0."""
    return x.gather(dim, x.abs().argmax(dim, keepdim=True)).squeeze(dim).add_(0)


# ---- 32 values and one scale: Q8_0, Q4_0, Q5_0; with an offset: Q4_1, Q5_1 -------------------------------------------


def pack_q8_0(x: torch.Tensor) -> torch.Tensor:
    """d (float16), q[32] (int8): x = d q, |q| <= 127. Halves are rounded away from zero (roundf)."""
    d = x.abs().amax(-1) / 127
    scaled = x * inverse(d)[:, None]
    whole = scaled.trunc()
    q = whole + scaled.sub_(whole).mul_(2).trunc_()
    return torch.cat((half(d), q.to(torch.int8).view(torch.uint8)), -1)


def unpack_q8_0(data: torch.Tensor) -> torch.Tensor:
    return from_half(data[:, :2]) * data[:, 2:].view(torch.int8)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """q [blocks, 32] -> [blocks, 16]: value i is the lower, value i + 16 the upper four bits of byte i."""
    low, high = (q & 15).chunk(2, -1)
    return low | high << 4


def pack_fifth_bits(q: torch.Tensor) -> torch.Tensor:
    """Bit i of the four bytes is the fifth bit of value i."""
    return ((q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(data: torch.Tensor) -> torch.Tensor:
    """bytes [blocks, n] -> their bits [blocks, 8n], lowest first."""
    return (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def pack_symmetric(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Q4_0, Q5_0: d (float16), [fifth bits,] q: x = d (q - 2^(bits-1)). The value of the largest magnitude is q = 0."""
    middle = 1 << bits - 1
    d = of_largest_magnitude(x, -1) / -middle
    q = (x * inverse(d)[:, None]).add_(middle + 0.5).to(torch.uint8).clamp_(max=2 * middle - 1)
    return torch.cat((half(d), *([pack_fifth_bits(q)] if bits == 5 else []), pack_nibbles(q)), -1)


def pack_offset(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Q4_1, Q5_1: d, m (float16), [fifth bits,] q: x = d q + m."""
    low, high = x.gather(-1, x.argmin(-1, keepdim=True)).squeeze(-1), x.amax(-1)  # of 0 and -0, the first
    top = (1 << bits) - 1
    d = ((high - low) / top).add_(0)  # never -0
    q = ((x - low[:, None]) * inverse(d)[:, None]).add_(0.5).to(torch.uint8).clamp_(max=top)
    return torch.cat((half(d), half(low), *([pack_fifth_bits(q)] if bits == 5 else []), pack_nibbles(q)), -1)


def unpack_symmetric(data: torch.Tensor, bits: int) -> torch.Tensor:
    q = torch.cat(nibbles(data[:, -16:]), -1)
    if bits == 5:
        q = q | unpack_bits(data[:, 2:6]) << 4
    return from_half(data[:, :2]) * (q.to(torch.int8) - (1 << bits - 1))


def unpack_offset(data: torch.Tensor, bits: int) -> torch.Tensor:
    q = torch.cat(nibbles(data[:, -16:]), -1)
    if bits == 5:
        q = q | unpack_bits(data[:, 4:8]) << 4
    return from_half(data[:, :2]) * q + from_half(data[:, 2:4])


# ---- 256 values in 8 groups, each with a scale and a minimum of 6 bits: Q4_K, Q5_K ---------------------------


def fit_scale_and_minimum(x: torch.Tensor, top: int, first: float, steps: int) -> tuple[torch.Tensor, ...]:
    """For each group the scale and minimum that fit x = scale q + minimum best, 0 <= q <= top (make_qkx2_quants).

    x: [values of a group, groups]. A number of grids is tried, whose steps differ a little: for each, the values are
    rounded to it and the best scale and minimum for these q follow by weighted least squares; the weights grow with
    |x|. Each grid begins at the best minimum so far. Returns (scale, -minimum, q).
    """
    count = len(x)
    weights = x.abs() + square_root(ordered_sum(x * x).div_(count))
    low, high = x.aminmax(dim=0)
    low.clamp_(max=0)
    q, error = torch.empty_like(x), torch.empty_like(x)
    products = torch.empty(count, 3, x.shape[1])
    sum_w, sum_x = ordered_sum(torch.stack((weights, weights * x), 1))

    def round_to_grid(start: torch.Tensor, inverse_step: torch.Tensor) -> None:
        q.copy_(nearest(torch.sub(x, start, out=q).mul_(inverse_step)).clamp_(0, top))

    def squared_error(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        torch.mul(q, scale, out=error).add_(minimum).sub_(x)
        return ordered_sum(error.square_().mul_(weights))

    minimum = start = low
    inverse_step = ratio(top, high - low)
    scale = 1 / inverse_step
    round_to_grid(start, inverse_step)
    best = squared_error(scale, minimum)
    for step in range(steps + 1):
        trial = np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)
        this_inverse = ratio(trial, high - minimum)
        round_to_grid(minimum, this_inverse)
        torch.mul(weights, q, out=products[:, 0])
        torch.mul(products[:, 0], q, out=products[:, 1])
        torch.mul(products[:, 0], x, out=products[:, 2])
        sum_q, sum_qq, sum_qx = ordered_sum(products)
        determinant = sum_w * sum_qq - sum_q * sum_q
        this_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
        this_minimum = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        this_scale = torch.where(this_minimum > 0, sum_qx / sum_qq, this_scale)
        this_minimum = this_minimum.clamp_(max=0)
        this_error = squared_error(this_scale, this_minimum)
        better = (determinant > 0) & (this_error < best)
        best = torch.where(better, this_error, best)
        start = torch.where(better, minimum, start)
        inverse_step = torch.where(better, this_inverse, inverse_step)
        scale = torch.where(better, this_scale, scale)
        minimum = torch.where(better, this_minimum, minimum)
    round_to_grid(start, inverse_step)
    flat = low == high
    return torch.where(flat, 0.0, scale), -torch.where(flat, low, minimum), q.masked_fill_(flat, 0)


def pack_scales(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of 6 bits, uint8 [8, blocks], in twelve bytes [blocks, 12].

    Bytes 0-3 and 4-7 hold scales and minima 0-3; bytes 8-11 the lower four bits of scales and minima 4-7, whose upper
    two bits are the upper two of bytes 0-3 and 4-7.
    """
    first = scales[:4] | scales[4:] >> 4 << 6
    second = minima[:4] | minima[4:] >> 4 << 6
    third = scales[4:] & 15 | (minima[4:] & 15) << 4
    return torch.cat((first, second, third)).T


def unpack_scales(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve bytes -> scales and minima, float32 [blocks, 8]."""
    first, second, third = data.split(4, -1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return scales.float(), minima.float()


def pack_k_offset(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Q4_K, Q5_K: d, dmin (float16), 12 bytes of scales, [32 bytes of fifth bits,] 128 bytes of nibbles.

    Group g of 32 values: x = d scale_g q - dmin minimum_g.
    """
    top = (1 << bits) - 1
    blocks = len(x)
    x = x.view(blocks, 8, 32).permute(2, 1, 0).contiguous()
    fit = fit_scale_and_minimum(x.view(32, -1), top, *{4: (-1.0, 20), 5: (-0.5, 15)}[bits])
    scales, minima, searched = fit[0].view(8, blocks), fit[1].view(8, blocks), fit[2].view(32, 8, blocks)
    d, scales = six_bits(scales)
    dmin, minima = six_bits(minima)
    # The 6-bit scales have moved the grid: round once more. Where the scale has become 0, the search's q stay.
    step = d.to(torch.float16).float() * scales
    offset = dmin.to(torch.float16).float() * minima
    q = torch.where(step == 0, searched, nearest((x + offset) / step).clamp_(0, top)).to(torch.uint8)
    pairs = q.view(32, 4, 2, blocks)
    packed = [half(d), half(dmin), pack_scales(scales, minima)]
    if bits == 5:  # bit g of byte i: the fifth bit of value i of group g
        fifths = torch.zeros(32, blocks, dtype=torch.uint8)
        for group in range(8):
            fifths |= q[:, group] >> 4 << group
        packed.append(fifths.T)
    low = pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4
    return torch.cat((*packed, low.permute(2, 1, 0).reshape(blocks, 128)), -1)


def six_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[8, blocks] -> (d [blocks], q uint8 [8, blocks]) with values near d q, q <= 63."""
    largest = values.amax(0).clamp_(min=0).add_(0)  # which makes 0 of -0
    factor = torch.where(largest > 0, ratio(63, largest), 0.0)
    return largest / 63, nearest(values * factor).to(torch.uint8).clamp_(max=63)


def unpack_k_offset(data: torch.Tensor, bits: int) -> torch.Tensor:
    d, dmin = from_half(data[:, :2]), from_half(data[:, 2:4])
    scales, minima = unpack_scales(data[:, 4:16])
    low, high = nibbles(data[:, -128:].view(-1, 4, 32))
    q = torch.stack((low, high), 2).view(-1, 8, 32)
    if bits == 5:
        groups = torch.arange(8, dtype=torch.uint8)[:, None]
        q = q | (data[:, None, 16:48] >> groups & 1) << 4
    return ((d * scales)[:, :, None] * q - (dmin * minima)[:, :, None]).view(-1, 256)


# ---- 256 values in 16 groups, each with a scale of 8 bits: Q6_K ----------------------------------------------


def fit_scale(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each group the scale that fits x = scale q best, -top <= q < top, weighted by x^2 (make_qx_quants).

    x: [values of a group, groups]. Returns (scale, q + top); a group of zeros has scale 0 and 0 for every q + top.
    """
    largest = of_largest_magnitude(x, 0)
    weights = x * x
    weighted = weights * x
    q = torch.empty_like(x)
    products = torch.empty(len(x), 2, x.shape[1])

    def round_to_grid(inverse_step: torch.Tensor) -> None:
        q.copy_(nearest(torch.mul(x, inverse_step, out=q)).clamp_(-top, top - 1))

    def sums(inverse_step: torch.Tensor) -> torch.Tensor:
        round_to_grid(inverse_step)
        torch.mul(weighted, q, out=products[:, 0])
        torch.mul(weights, q, out=products[:, 1]).mul_(q)
        return ordered_sum(products)

    best_inverse = ratio(-top, largest)
    sum_qx, sum_qq = sums(best_inverse)
    scale = torch.where(sum_qq != 0, sum_qx / sum_qq, 0.0)
    best = scale * sum_qx
    for step in (*range(-9, 0), *range(1, 10)):
        inverse_step = ratio(-(np.float32(top) + np.float32(0.1) * np.float32(step)), largest)
        sum_qx, sum_qq = sums(inverse_step)
        better = (sum_qq > 0) & (sum_qx * sum_qx > best * sum_qq)
        scale = torch.where(better, sum_qx / sum_qq, scale)
        best = torch.where(better, scale * sum_qx, best)
        best_inverse = torch.where(better, inverse_step, best_inverse)
    round_to_grid(best_inverse)
    zero = largest.abs() < SMALLEST
    return scale.masked_fill_(zero, 0), q.add_(top).masked_fill_(zero, 0)


def pack_q6_k(x: torch.Tensor) -> torch.Tensor:
    """Q6_K: 128 bytes of lower four bits, 64 of upper two, 16 scales (int8), d (float16). x = d scale_g (q - 32).

    Each half of 128 values is four runs of 32: runs 0 and 2 share the bytes 0-31 of the half's lower bits, runs 1 and 3
    the bytes 32-63, and all four the 32 bytes of upper bits.
    """
    blocks = len(x)
    x = x.view(blocks, 16, 16).permute(2, 1, 0).contiguous()
    scales, searched = fit_scale(x.view(16, -1), 32)
    scales, searched = scales.view(16, blocks), searched.view(16, 16, blocks)
    largest = of_largest_magnitude(scales, 0)
    zero = largest.abs() < SMALLEST
    factor = torch.where(zero, 0.0, ratio(-128, largest))
    d = inverse(factor)
    scales = nearest(scales * factor).clamp_(max=127)
    step = d.to(torch.float16).float() * scales
    q = torch.where(step == 0, searched, nearest(x / step).clamp_(-32, 31).add_(32)).to(torch.uint8)
    q = q.masked_fill_(zero, 0).permute(2, 1, 0).reshape(blocks, 2, 4, 32)
    low, high = q & 15, q >> 4
    low = low[:, :, :2] | low[:, :, 2:] << 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = scales.to(torch.int8).T.contiguous().view(torch.uint8)
    return torch.cat((low.reshape(blocks, 128), high.reshape(blocks, 64), scales, half(d)), -1)


def unpack_q6_k(data: torch.Tensor) -> torch.Tensor:
    low, high = data[:, :128].view(-1, 2, 2, 32), data[:, 128:192].view(-1, 2, 32)
    low = torch.cat(nibbles(low), 2)
    high = torch.stack([high >> 2 * run & 3 for run in range(4)], 2)
    q = (low | high << 4).view(-1, 16, 16).to(torch.int8) - 32
    scales = from_half(data[:, 208:]) * data[:, 192:208].view(torch.int8)
    return (scales[:, :, None] * q).view(-1, 256)


# ---- read, never written: Q2_K, Q3_K ------------------------------------------------------------------------------


def two_bits(data: torch.Tensor) -> torch.Tensor:
    """64 bytes -> 256 values of two bits: each half of 32 bytes holds four runs of 32, lowest bits first."""
    halves = data.reshape(-1, 2, 32)
    return torch.stack([halves >> 2 * run & 3 for run in range(4)], 2).view(-1, 16, 16)


def unpack_q2_k(data: torch.Tensor) -> torch.Tensor:
    """Q2_K: 16 bytes (scale | minimum << 4), 64 bytes of q, d, dmin. x = d scale_g q - dmin minimum_g."""
    scales, minima = nibbles(data[:, :16])
    scales, minima = from_half(data[:, 80:82]) * scales, from_half(data[:, 82:84]) * minima
    return (scales[:, :, None] * two_bits(data[:, 16:80]) - minima[:, :, None]).view(-1, 256)


def unpack_q3_k(data: torch.Tensor) -> torch.Tensor:
    """Q3_K: 32 bytes of third bits, 64 of lower two, 12 of scales (6 bits, 32 added), d. x = d scale_g (q - 4)."""
    bits = data[:, None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    q = (two_bits(data[:, 32:96]) | bits.view(-1, 16, 16) << 2).to(torch.int8) - 4
    low = torch.cat(nibbles(data[:, 96:104]), -1)
    high = torch.cat([data[:, 104:108] >> 2 * run & 3 for run in range(4)], -1)
    scales = from_half(data[:, 108:]) * ((low | high << 4).to(torch.int8) - 32)
    return (scales[:, :, None] * q).view(-1, 256)
