"""Checks of chapter 2's exercises: python tutorial/exercises/02_svd_to_shards.py my_answers.py"""

import torch
from grade import main

import hd_pissa


def check_1(answer):
    """Oracle: the projector on eigenvectors of W W^T, and the balance of the two factors."""
    for m, n, K, r in ((8, 11, 2, 3), (9, 7, 3, 2)):
        W = torch.randn((m, n), generator=torch.Generator().manual_seed(m), dtype=torch.float64)
        vectors = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)           # of the largest eigenvalue first
        shards = answer(W.clone(), K, r)
        assert isinstance(shards, list) and len(shards) == K, f"return a list of {K} pairs"
        for i, (A, B) in enumerate(shards):
            assert A.shape == (m, r) and B.shape == (r, n), f"shard {i}: A is (m, r) and B is (r, n)"
            P = vectors[:, i * r:(i + 1) * r]
            error = float((A @ B - P @ P.T @ W).abs().max())
            assert error < 1e-10, f"shard {i}: A B is off by {error:.1e} from W's components {i * r} and on"
            error = float((A.T @ A - B @ B.T).abs().max())
            assert error < 1e-10, f"shard {i}: A^T A and B B^T differ by {error:.1e}; share S between A and B"


def check_2(answer):
    """Oracle: hd_pissa.attach, told to adapt every layer, takes this r and refuses the next."""
    for shapes, K in (([(16, 24), (16, 8)], 2), ([(16, 16), (16, 48), (48, 16)], 4), ([(11, 30)], 3)):
        model = torch.nn.ModuleList(torch.nn.Linear(m, n).double() for m, n in shapes)
        every = [str(i) for i in range(len(shapes))]
        r = answer(list(shapes), K)
        assert isinstance(r, int) and r >= 1, f"return a whole number of 1 or more, not {r!r}"
        try:
            hd_pissa.attach(model, r, shards=K, targets=every).detach_()
        except ValueError as refusal:
            raise AssertionError(f"{r} is too large for {shapes} and K = {K}: {refusal}") from None
        try:
            hd_pissa.attach(model, r + 1, shards=K, targets=every)
        except ValueError:
            continue
        raise AssertionError(f"{r} is not the largest for {shapes} and K = {K}: {r + 1} works too")


def check_3(answer):
    """Oracle: planes built with a known smallest angle between them."""
    Q = torch.linalg.qr(torch.randn((9, 4), generator=torch.Generator().manual_seed(0)).double()).Q
    mix_1, mix_2 = torch.tensor([[[3.0, 1.0], [0.5, 2.0]], [[1.0, -4.0], [1.0, 1.0]]], dtype=torch.float64)
    for angle in (0.3, 1.2):
        cosine = float(torch.tensor(angle).double().cos())
        turned = torch.stack((cosine * Q[:, 0] + (1 - cosine**2) ** 0.5 * Q[:, 2], Q[:, 3]), dim=1)
        got = float(answer(Q[:, :2] @ mix_1, turned @ mix_2))
        assert abs(got - cosine) < 1e-6, f"the planes' smallest angle has cosine {cosine:.3f}, not {got:.3f}"
    got = float(answer(Q[:, :2] @ mix_1, Q[:, 2:] @ mix_2))
    assert abs(got) < 1e-6, f"orthogonal planes have cosine 0, not {got:.3f}"


if __name__ == "__main__":
    main(globals())
