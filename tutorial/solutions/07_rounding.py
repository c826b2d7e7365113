"""Solutions of chapter 7's exercises."""

import math

import torch


def answer_1(x):
    return 2.0 ** (math.frexp(x)[1] - 8)        # |x| = f 2^e with 1/2 <= f < 1, and 8 bits of f


def answer_2(W):
    bits = W.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def answer_3(W, generator):
    noise = torch.randint(2**16, W.shape, generator=generator, dtype=torch.int32)
    return ((W.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
