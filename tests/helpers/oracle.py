"""The method written down a second time: float64 numpy, one singular triplet at a time, nothing shared with dskd/.

Every function takes single (m, n) matrices and follows the formulas in docs/method.md to the letter, without floors or
guards: it is meant for matrices in general position (distinct, positive singular values).
"""

import numpy as np


def as_array(matrix) -> np.ndarray:
    """A float64 copy of a torch tensor or anything that numpy reads."""
    if hasattr(matrix, "detach"):
        matrix = matrix.detach().cpu().double().numpy()
    return np.array(matrix, dtype=np.float64)


def triplets(matrix) -> list[tuple[np.ndarray, float, np.ndarray]]:
    """The r = min(m, n) singular triplets (u_i, sigma_i, v_i), largest sigma first."""
    left, sigma, right = np.linalg.svd(as_array(matrix), full_matrices=False)
    return [(left[:, i], sigma[i], right[i]) for i in range(len(sigma))]


def scores(update, grad, alpha: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(g, c, J), each of length r: first order, second order, and their blend."""
    grad = as_array(grad)
    first, second = [], []
    for u, sigma, v in triplets(update):
        first.append(sigma * abs(u @ grad @ v))
        second.append(0.5 * sigma**2 * (u @ grad @ grad.T @ u) * (v @ grad.T @ grad @ v))
    first, second = np.array(first), np.array(second)
    return first, second, (1 - alpha) * first / first.sum() + alpha * second / second.sum()


def weights(blend, rank: int) -> np.ndarray:
    """w of length r: min-max over the `rank` largest (0: all), divided by its sum; 0 elsewhere."""
    blend = np.asarray(blend, dtype=np.float64)
    kept = len(blend) if rank == 0 else min(rank, len(blend))
    chosen = sorted(range(len(blend)), key=lambda i: -blend[i])[:kept]
    low, high = min(blend[i] for i in chosen), max(blend[i] for i in chosen)
    result = np.zeros(len(blend))
    for i in chosen:
        result[i] = (blend[i] - low) / (high - low)
    return result / result.sum()


def first_weights(r: int, rank: int) -> np.ndarray:
    """w before the first refresh: 1/rank on the first `rank` directions (rank 0: 1/r on all)."""
    kept = r if rank == 0 else min(rank, r)
    return np.array([1 / kept if i < kept else 0.0 for i in range(r)])


def weighted(matrix, w) -> np.ndarray:
    """W~ = sum_i sqrt(w_i) sigma_i u_i v_i^T over the matrix's own singular triplets."""
    result = np.zeros_like(as_array(matrix))
    for w_i, (u, sigma, v) in zip(w, triplets(matrix), strict=True):
        result += np.sqrt(w_i) * sigma * np.outer(u, v)
    return result


def own_loss(student, teacher, w) -> float:
    """|| W~_s - W~_t ||_F^2, each network in its own singular directions."""
    return float(((weighted(student, w) - weighted(teacher, w)) ** 2).sum())


def update_loss(student, teacher, update, w) -> float:
    """sum_i w_i (u_i^T (W_s - W_t) v_i)^2 with u_i, v_i of the update."""
    gap = as_array(student) - as_array(teacher)
    return float(sum(w_i * (u @ gap @ v) ** 2 for w_i, (u, _, v) in zip(w, triplets(update), strict=True)))


def update_gradient(student, teacher, update, w) -> np.ndarray:
    """The gradient of `update_loss`: sum_i 2 w_i (u_i^T (W_s - W_t) v_i) u_i v_i^T."""
    gap = as_array(student) - as_array(teacher)
    result = np.zeros_like(gap)
    for w_i, (u, _, v) in zip(w, triplets(update), strict=True):
        result += 2 * w_i * (u @ gap @ v) * np.outer(u, v)
    return result


def mean_factors(gradients, share: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(A, B): running means of m G G^T / ||G||^2 and n G^T G / ||G||^2, which start as identities."""
    m, n = as_array(gradients[0]).shape
    A, B = np.eye(m), np.eye(n)
    for G in map(as_array, gradients):
        energy = (G**2).sum()
        A = share * A + (1 - share) * m * np.array([[a @ b for b in G] for a in G]) / energy
        B = share * B + (1 - share) * n * np.array([[a @ b for b in G.T] for a in G.T]) / energy
    return A, B


def curvature_quadratic(student, teacher, A, B) -> float:
    """sum_ij a_i b_j (u_i^T (W_s - W_t) v_j)^2 / r over the eigenvectors of A and B."""
    gap = as_array(student) - as_array(teacher)
    (a, U), (b, V) = np.linalg.eigh(A), np.linalg.eigh(B)
    total = sum(a[i] * b[j] * (U[:, i] @ gap @ V[:, j]) ** 2 for i in range(len(a)) for j in range(len(b)))
    return float(total / min(gap.shape))


def own_gradient(student, teacher, w) -> np.ndarray:
    """The gradient of `own_loss` with respect to the student, by the spectral-function formula."""
    student = as_array(student)
    m, n = student.shape
    left, sigma, right = np.linalg.svd(student, full_matrices=False)
    right = right.T
    root = np.sqrt(w)
    g = root * sigma
    H = 2 * (weighted(student, w) - weighted(teacher, w))
    C = left.T @ H @ right
    r = len(sigma)
    inner = np.zeros((r, r))
    for i in range(r):
        for j in range(r):
            minus = root[i] if i == j else (g[i] - g[j]) / (sigma[i] - sigma[j])
            plus = (g[i] + g[j]) / (sigma[i] + sigma[j])
            inner[i, j] = minus * (C[i, j] + C[j, i]) / 2 + plus * (C[i, j] - C[j, i]) / 2
    result = left @ inner @ right.T
    if m < n:
        result += left @ np.diag(g / sigma) @ (left.T @ H - C @ right.T)
    if m > n:
        result += (H @ right - left @ C) @ np.diag(g / sigma) @ right.T
    return result


def finite_difference(function, matrix, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function of one matrix, entry by entry."""
    matrix = as_array(matrix)
    result = np.zeros_like(matrix)
    for index in np.ndindex(*matrix.shape):
        bump = np.zeros_like(matrix)
        bump[index] = step
        result[index] = (function(matrix + bump) - function(matrix - bump)) / (2 * step)
    return result


def spectrum_scale(student_at_start, teacher) -> float:
    """c of the reading Spectrum: equal energy in the leading min(r_s, r_t) directions of both."""
    ours, theirs = ([sigma for _, sigma, _ in triplets(matrix)] for matrix in (student_at_start, teacher))
    r = min(len(ours), len(theirs))
    return float(np.sqrt(sum(s**2 for s in ours[:r]) / sum(s**2 for s in theirs[:r])))


def spectrum_loss(student, teacher, w, scale: float) -> float:
    """sum_i w_i (sigma_i(W_s) - c sigma_i(W_t))^2 over the directions that both have."""
    both = zip(w, triplets(student), triplets(teacher), strict=False)
    return float(sum(w_i * (ours - scale * theirs) ** 2 for w_i, (_, ours, _), (_, theirs, _) in both))


def spectrum_gradient(student, teacher, w, scale: float) -> np.ndarray:
    """The gradient of `spectrum_loss`: sum_i 2 w_i (sigma_i(W_s) - c sigma_i(W_t)) u_i v_i^T."""
    result = np.zeros_like(as_array(student))
    for w_i, (u, ours, v), (_, theirs, _) in zip(w, triplets(student), triplets(teacher), strict=False):
        result += 2 * w_i * (ours - scale * theirs) * np.outer(u, v)
    return result
