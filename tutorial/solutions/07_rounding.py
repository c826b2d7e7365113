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
    # It costs noise. A step d at spacing u adds a variance of about d u: after 1000 steps of 7.6e-7 at
    # u = 1.2e-4 the weight is off by 3e-4, where it was to move by 7.6e-4.
    noise = torch.randint(2**16, W.shape, generator=generator, dtype=torch.int32)
    return ((W.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
