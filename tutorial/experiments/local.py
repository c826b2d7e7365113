"""Tries to improve the local form, in which shard i learns from the mini-batch of device i alone.

All of them leave the forward, the direct update and AdamW as they are, and add to what a device knows:

    grouped         gradients are means over groups of g devices
    SharedMoments   two devices that see the same numbers in their first moments go on with the mean
    Feedback        what slice i cannot express of a local gradient goes on to the device of the next slice
"""

import torch

import hd_pissa


def grouped(batch: list, K: int, g: int) -> list:
    """Rows for K shards, each given all rows of its group: devices 0 .. g-1, g .. 2g-1, ..."""
    size = g * len(batch) // K
    return [row for i in range(K) for row in batch[i // g * size:][:size]]


def layers(adapters):
    """(name, A (m, Kr), B (Kr, n), leaves dA, leaves dB) of each layer, shards side by side."""
    state, leaves = adapters.state_dict(), dict(adapters.named_parameters())
    for name in dict.fromkeys(key.rpartition(".shard")[0] for key in leaves):
        A, B, dA, dB = ([source[f"{name}.shard{i}.{kind}"] for i in range(adapters.K)]
                        for source, kind in ((state, "A"), (state, "B"), (leaves, "dA"), (leaves, "dB")))
        yield name, torch.cat(A, 1), torch.cat(B, 0), dA, dB


class SharedMoments:
    """First moments that agree where two devices see the same.

    With G the gradient of W, block (i, j) of A^T G B^T, (Kr, Kr), is A_i^T G B_j^T. Device i has it in its
    gradient g_B = A_i^T G, device j in its g_A = G B_j^T, each from its own rows. Both go on with

        (1 - share) times their own + share times the other's,    share = 1/2: the mean

    and keep the rest of their gradients. So first moments, which are sums of gradients, agree as well. Shared
    behind AdamW's second moments they could exceed these by far, and the step the rate. A device receives
    2 (K - 1) r^2 numbers a layer.
    """

    def __init__(self, adapters, optimizer: torch.optim.Optimizer, share: float = 0.5):
        ones = torch.ones(adapters.r, adapters.r)
        self.r, self.weight = adapters.r, share * (1 - torch.block_diag(*[ones] * adapters.K))
        self.layers = [(A, B, torch.linalg.pinv(A), torch.linalg.pinv(B), dA, dB)
                       for _, A, B, dA, dB in layers(adapters)]
        optimizer.register_step_pre_hook(lambda *_: self.exchange())

    @torch.no_grad()
    def exchange(self) -> None:
        for A, B, A_inverse, B_inverse, dA, dB in self.layers:
            g_A, g_B = torch.cat([p.grad for p in dA], 1), torch.cat([p.grad for p in dB], 0)
            D = self.weight.to(A) * (g_B @ B.T - A.T @ g_A)                 # (Kr, Kr), i's blocks - j's
            for p, change in zip(dA, (A_inverse.T @ D).split(self.r, 1)):
                p.grad += change
            for p, change in zip(dB, (D @ B_inverse.T).split(self.r, 0)):
                p.grad -= change


class Feedback:
    """Error feedback around the ring of devices.

    G_i is the gradient of W on the rows of device i, E_i (m, n) what the device was handed. The slice learns
    from both, and hands on what it could not express:

        g_A = (G_i + E_i) B_i^T,    g_B = A_i^T (G_i + E_i)
        E_(i+1) = (I - Q_i Q_i^T) (G_i + E_i) (I - R_i^T R_i) of the next step

    Q_i, R_i: orthonormal bases of A_i's columns and B_i's rows. Kept on its own device, that would change
    nothing: the slice is fixed, so it never could express it. What no slice can is dropped at once, and E is
    held as factors (m, rank), (rank, n): nearly the best that there are. With rank 2Kr they hold all of it.

    G_i is formed here, where a device would need products of it with the factors alone.
    """

    def __init__(self, model, adapters, optimizer: torch.optim.AdamW, rank: int, seed: int = 0):
        self.rank, self.layers, self.handed = rank, [], {}
        self.generator = torch.Generator().manual_seed(hd_pissa.seed_of("feedback", seed))
        for name, A, B, dA, dB in layers(adapters):
            G, shards = [], [*zip(A.split(adapters.r, 1), B.split(adapters.r, 0), dA, dB)]
            spans = [(span(X), span(Y.T).T) for X, Y in ((A, B), *(shard[:2] for shard in shards))]
            self.layers.append((G, shards, spans))
            model.get_submodule(name).register_forward_hook(gradients_of_weight(G))
        optimizer.register_step_pre_hook(lambda *_: self.deliver())
        optimizer.register_step_post_hook(lambda *_: [optimizer.state[p].update(handed=factor)
                                                      for p, factor in self.handed.items()])

    @torch.no_grad()
    def deliver(self) -> None:
        before, self.handed = self.handed, {}
        for G, shards, (union, *spans) in self.layers:
            if len(G) != len(shards):
                raise ValueError(f"{len(G)} backwards for {len(shards)} shards: one each, in their order")
            for i, (A, B, dA, dB) in enumerate(shards):
                M = G[i]
                if before:
                    E = before[dA] @ before[dB]
                    M, dA.grad, dB.grad = M + E, dA.grad + E @ B.T, dB.grad + A.T @ E
                M = beyond(M - beyond(M, *union), *spans[i])
                after = shards[(i + 1) % len(shards)]
                self.handed |= zip(after[2:], self.compressed(M))
            G.clear()

    def compressed(self, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(m, rank) and (rank, n) whose product is near M, by subspace iteration from a random start."""
        L = torch.randn((M.shape[1], self.rank), generator=self.generator).to(M)
        for _ in range(2):
            L = M.T @ span(M @ L)
        L = span(M @ L)
        return L, L.T @ M


def gradients_of_weight(G: list):
    """A forward hook, after which every backward appends the layer's X^T dY (m, n) to G."""
    def hook(module, inputs, output):
        if output.requires_grad:
            X = inputs[0].detach().flatten(0, -2)                           # (T, m)
            output.register_hook(lambda dY: G.append(X.T @ dY.flatten(0, -2)))
    return hook


def span(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(X).Q


def beyond(M: torch.Tensor, Q: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """The part of M that no X R + Q Y is: (I - Q Q^T) M (I - R^T R)."""
    M = M - Q @ (Q.T @ M)
    return M - (M @ R.T) @ R
