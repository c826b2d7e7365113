"""Solutions of chapter 8's exercises."""


def answer_1(n, P, p):
    chunk = -(-n // P)
    return min(p * chunk, n), min((p + 1) * chunk, n)


def answer_2(W_rows, a, b, P, Q, K):
    return W_rows + Q[:, a:b].T @ P.T / K


def answer_3(m, n, r, K, P):
    return -(-n // P) * m, K * r * (m + n), 4 * (K // P) * r * (m + n)
