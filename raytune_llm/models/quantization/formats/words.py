"""Small whole numbers that are packed in words of 32 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unpacked(words_WN: Tensor, bits: int) -> Tensor:
    """The numbers of `bits` bits that follow one another down each column, from the lowest bit of its first word on; one may
    begin in a word and end in the next. [W, N] of int32 -> [32 W / bits, N] of uint8."""
    words_a_period = bits // math.gcd(bits, 32)
    numbers_a_period = 32 * words_a_period // bits
    W, N = words_WN.shape
    assert W % words_a_period == 0, (W, bits)
    numbers = torch.empty((32 * W // bits, N), dtype=torch.uint8, device=words_WN.device)
    for place in range(numbers_a_period):
        word, first = divmod(place * bits, 32)
        here = min(bits, 32 - first)
        number_WN = words_WN[word::words_a_period] >> first & (1 << here) - 1
        if here < bits:
            number_WN |= words_WN[word + 1 :: words_a_period] << here & (1 << bits) - 1
        numbers[place::numbers_a_period] = number_WN
    return numbers
