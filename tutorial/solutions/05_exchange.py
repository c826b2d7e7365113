"""Solutions of chapter 5's exercises."""


def answer_1(K, r, m, n):
    return 2 * (K - 1) * m * n // K, (K - 1) * r * (m + n)


def answer_2(messages, shapes, r):
    pairs, at = [], 0
    for m, n in shapes:
        dA, dB = messages[:, at:at + r * (m + n)].split((r * m, r * n), dim=1)
        pairs.append((dA.unflatten(1, (m, r)), dB.unflatten(1, (r, n))))
        at += r * (m + n)
    return pairs


def answer_3(parts):
    return sum(parts[i] for i in sorted(parts))
