"""Decompositions on disk, so that a weight is decomposed once for every K and r."""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
from pathlib import Path

import torch

import hd_pissa_extra
from training.processes import everywhere


def hold(handle: int) -> bool:
    """Lock an open file until it is closed, or until the kernel does that for a killed process.

    False where another process has it, or where there are no such locks.
    """
    try:
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def prepare(folder: str) -> None:
    """Make the folder, and delete what killed runs of this host were writing in it.

    That is: files of our names that nobody holds. Those of other hosts stay, as their locks may not be
    seen from here.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--svd_cache {folder} is no folder and cannot be made one ({e}); give another, or "
                         "none") from e
    names = rf"[0-9a-f]{{32}}_\d+x\d+_\w+\.{re.escape(socket.gethostname())}\.[0-9a-f]+"
    for path in Path(folder).iterdir():
        if re.fullmatch(names, path.name):
            with contextlib.suppress(OSError):          # a link, or another process was first
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                with open(handle, "rb"):
                    if stat.S_ISREG(os.fstat(handle).st_mode) and hold(handle):
                        path.unlink()


def keep(found, path: Path) -> None:
    """Write components under a name of this process alone, then rename; ValueError where that fails.

    Several processes, and machines that share a disk, may write the same file at a time.
    """
    unfinished = path.with_suffix(f".{socket.gethostname()}.{secrets.token_hex(8)}")
    try:
        with open(unfinished, "wb") as file:
            hold(file.fileno())
            torch.save([t.contiguous() for t in found], file)
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):    # removed between its making and its lock
                os.replace(unfinished, path)
    except (OSError, RuntimeError) as e:                # torch says RuntimeError where a disk is full
        unfinished.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({' '.join(str(e).split())[:200]}); make room, or give "
                         "another --svd_cache, or none") from e


def cached_components(folder: str):
    """`hd_pissa_extra.components` that keeps what it computed, by the weight's bits, and slices it.

    A file with k components serves every K r <= k. It is believed only if its components fit the weight,
    ||W V - U S|| small for each. ValueError, naming the file, for a damaged one or one of another weight.
    """
    everywhere(lambda: prepare(folder))

    def decompose(W, k, name):
        bits = W.detach().contiguous().cpu().view(torch.uint8)          # (m, n), in an order the key names
        key = hashlib.blake2b(memoryview(bits.numpy()), digest_size=16).hexdigest()
        path = Path(folder, f"{key}_{W.shape[0]}x{W.shape[1]}_{str(W.dtype)[6:]}.pt")
        if path.exists():
            try:
                if not path.is_file():              # torch.load would wait at a pipe
                    raise ValueError("no file")
                U, S, Vt = torch.load(path, map_location=W.device, weights_only=True)
                off = W.double() @ Vt.T.double() - U.double() * S           # TF32 would not do for this
                fits = off.norm(dim=0).max() <= 1e-4 * S[0]
            except Exception as e:      # whatever a damaged file makes torch.load raise
                raise ValueError(f"{path} is damaged ({type(e).__name__}); delete it") from None
            if not fits:
                raise ValueError(f"{path} does not hold the components of {name}; delete it")
            if S.shape[0] >= k:
                return U[:, :k], S[:k], Vt[:k]
        found = hd_pissa_extra.components(W, k, name)
        keep(found, path)
        return found

    return decompose
