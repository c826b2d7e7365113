"""Checks of chapter 7's exercises: python tutorial/exercises/07_rounding.py my_answers.py"""

import torch
from grade import main


def bits(*patterns):
    return torch.tensor(patterns).to(torch.int32).view(torch.float32)


def check_1(answer):
    """Oracle: torch.nextafter, the neighbouring number itself."""
    for x in (1.0, 1.5, 3.0, 0.0245, -0.0245, 1e-3, 2.0**-20, 240.0):
        here = torch.tensor(x).bfloat16()
        away = torch.nextafter(here, here * float("inf"))
        wanted, got = float((away.double() - here.double()).abs()), answer(float(here))
        assert got == wanted, f"from {float(here)} to the next bfloat16 it is {wanted}, not {got}"


def check_2(answer):
    """Oracle: integers put together again, and distances in float64."""
    g = torch.Generator().manual_seed(0)
    W = torch.cat((torch.randn(1000, generator=g), bits(0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000),
                   bits(0x00000001, 0x00008000, 0x807FFFFF, 0, 0x80000000), bits(0x3FFFFFFF, 0xBFFF8000)))
    got = answer(W.clone())
    assert isinstance(got, tuple) and len(got) == 2, "return the pair (high, low)"
    high, low = got
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16), "high is bfloat16 and low int16"
    top, pattern = high.view(torch.int16).long(), W.view(torch.int32).long()
    lost = top * 2**16 + low.long() != pattern
    assert not lost.any(), f"high 2^16 + low, as integers, is not the pattern of W = {W[lost].tolist()[:3]}"
    down, up = (pattern >> 16) * 2**16, ((pattern >> 16) + 1) * 2**16
    assert ((top * 2**16 - pattern).abs() <= torch.minimum(pattern - down, up - pattern)).all(), (
        "high is not the nearest bfloat16 everywhere")


def truncated(W):
    pattern = W.view(torch.int32)
    return (pattern >> 16).to(torch.int16).view(torch.bfloat16), (pattern & 0xFFFF).to(torch.int16)


def half_to_even(W):
    high = W.bfloat16()
    return high, (W.view(torch.int32) - (high.view(torch.int16).to(torch.int32) << 16)).to(torch.int16)


WRONG_2 = [truncated, half_to_even]


def check_3(answer):
    """Oracle: the mean of many draws is W, and every draw is one of W's two neighbours."""
    g = torch.Generator().manual_seed(0)
    W = torch.cat((torch.randn(40, generator=g), torch.tensor([1.0, -2.0])))
    draws = torch.stack([answer(W.clone(), torch.Generator().manual_seed(i)) for i in range(1500)])
    assert draws.dtype == torch.bfloat16, "every draw is to be a bfloat16 tensor"
    down = (W.view(torch.int32) >> 16 << 16).view(torch.float32).double()          # toward zero
    unit = 2.0 ** (torch.frexp(W.double()).exponent - 8.0)
    steps = (draws.double() - down) * W.sign() / unit
    assert ((steps == 0) | (steps == 1)).all(), "a draw is not one of the two bfloat16 numbers around W"
    wanted = (W.double() - down).abs() / unit
    spread = (wanted * (1 - wanted) / len(draws)).sqrt()
    assert ((steps.mean(0) - wanted).abs() <= 5 * spread).all(), "the mean of many draws is not W"


WRONG_3 = [lambda W, generator: W.bfloat16(), lambda W, generator: truncated(W)[0]]

if __name__ == "__main__":
    main(globals())
