"""Decompositions on disk, so that a weight is decomposed once for every K and r."""

import hashlib
import os
import socket
from pathlib import Path

import torch

import hd_pissa_extra


def cached_components(folder: str):
    """`hd_pissa_extra.components` that keeps what it computed, by the weight's bits, and slices it.

    A file with k components serves every K r <= k. It is believed only if its components fit the weight,
    ||W V - U S|| small for each. ValueError, naming the file, for a damaged one or one of another weight.
    """
    def decompose(W, k, name):
        Path(folder).mkdir(parents=True, exist_ok=True)
        bits = W.detach().contiguous().cpu().view(torch.uint8)          # (m, n), in an order the key names
        key = hashlib.blake2b(memoryview(bits.numpy()), digest_size=16).hexdigest()
        path = Path(folder, f"{key}_{W.shape[0]}x{W.shape[1]}_{str(W.dtype)[6:]}.pt")
        if path.exists():
            try:
                if not path.is_file():              # torch.load would wait at a pipe
                    raise ValueError("no file")
                U, S, Vt = torch.load(path, map_location=W.device, weights_only=True)
                fits = (W.to(U) @ Vt.T - U * S).norm(dim=0).max() <= 1e-4 * S[0]
            except Exception as e:      # whatever a damaged file makes torch.load raise
                raise ValueError(f"{path} is damaged ({type(e).__name__}); delete it") from None
            if not fits:
                raise ValueError(f"{path} does not hold the components of {name}; delete it")
            if S.shape[0] >= k:
                return U[:, :k], S[:k], Vt[:k]
        found = hd_pissa_extra.components(W, k, name)
        # Several processes, and machines that share a disk, may write the same file at a time.
        temporary = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
        torch.save([t.contiguous() for t in found], temporary)
        os.replace(temporary, path)
        return found

    return decompose
