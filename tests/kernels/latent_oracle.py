"""Latent attention recomputed with NumPy from the weights that latent_dump wrote.

    latent_oracle.py LATENT_DUMP
"""

import math
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

EPSILON = 1e-6
BASE = 10000.0
ORIGINAL = 64
MSCALE, MSCALE_ALL_DIM = 1.0, 0.7

# model, heads, q_rank, kv_rank, d_nope, d_rope, d_v, tokens, queries, factor of YaRN
CASES = [
    (7, 1, 0, 5, 3, 2, 4, 1, 1, 1),
    (24, 3, 0, 16, 8, 4, 6, 50, 50, 1),
    (48, 6, 20, 33, 11, 10, 13, 101, 4, 8),
    (96, 20, 32, 64, 16, 16, 16, 257, 1, 40),
    (2048, 16, 0, 512, 128, 64, 128, 24, 3, 40),  # DeepSeek-V2-Lite
]


def turns(d_rope, factor):
    """Radians a position of each pair, and what YaRN multiplies cosine and sine by."""
    pairs = np.arange(d_rope // 2)
    plain = BASE ** (-2.0 * pairs / d_rope)
    if factor == 1:
        return plain, 1.0
    # Pairs that turn more than 32 times in the original context stay, those that turn less than
    # once are slowed, those between are mixed.
    def pair_with(count):
        return d_rope * math.log(ORIGINAL / (count * 2 * math.pi)) / (2 * math.log(BASE))
    low = max(math.floor(pair_with(32)), 0)
    high = min(math.ceil(pair_with(1)), d_rope - 1)
    slowed = np.clip((pairs - low) / (high - low if high != low else 0.001), 0, 1)
    magnitude = (0.1 * MSCALE * math.log(factor) + 1) / (0.1 * MSCALE_ALL_DIM * math.log(factor) + 1)
    return plain / factor * slowed + plain * (1 - slowed), magnitude


def rope(x, positions, factor):
    """x [tokens, ..., d_rope], pairs of neighbours as complex numbers."""
    radians, magnitude = turns(x.shape[-1], factor)
    z = x[..., 0::2] + 1j * x[..., 1::2]
    angle = np.multiply.outer(positions, radians)
    angle = angle.reshape(angle.shape[:1] + (1,) * (x.ndim - 2) + angle.shape[1:])
    z = magnitude * z * np.exp(1j * angle)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def rms_norm(x, gamma):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * gamma


def layer(case, w):
    """The cache's rows and y of the last queries."""
    model, heads, q_rank, kv_rank, d_nope, d_rope, d_v, tokens, queries, factor = case
    x = w["x"].reshape(tokens, model)
    c = x @ w["down_kv"].reshape(model, kv_rank + d_rope)
    latent = rms_norm(c[:, :kv_rank], w["kv_gamma"])
    key = rope(c[:, kv_rank:], np.arange(tokens), factor)
    last = x[tokens - queries:]
    if q_rank:
        last = rms_norm(last @ w["down_q"].reshape(model, q_rank), w["q_gamma"])
    q = (last @ w["up_q"].reshape(q_rank or model, -1)).reshape(queries, heads, d_nope + d_rope)
    positions = np.arange(tokens - queries, tokens)
    q = np.concatenate([q[..., :d_nope], rope(q[..., d_nope:], positions, factor)], axis=-1)
    k = np.einsum("nc,hcd->nhd", latent, w["up_k"].reshape(heads, kv_rank, d_nope))
    k = np.concatenate([k, np.broadcast_to(key[:, None], (tokens, heads, d_rope))], axis=-1)
    v = np.einsum("nc,hcd->nhd", latent, w["up_v"].reshape(heads, kv_rank, d_v))
    scale = 1 / math.sqrt(d_nope + d_rope)
    if factor > 1:
        scale *= (0.1 * MSCALE_ALL_DIM * math.log(factor) + 1) ** 2
    scores = scale * np.einsum("qhd,nhd->hqn", q, k)
    scores = np.where(np.arange(tokens) <= positions[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    o = np.einsum("hqn,nhd->qhd", p, v)
    return np.concatenate([latent, key], axis=-1), o.reshape(queries, -1) @ w["out"].reshape(-1, model)


def error(found, expected):
    found = found.reshape(expected.shape)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(case, dump):
    """What is wrong with one case."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([dump, folder, *map(str, case)], check=True, timeout=120)
        w = {path.stem: np.load(path).astype(np.float64)
             for path in pathlib.Path(folder).glob("*.npy")}
    rows, y = layer(case, w)
    bounds = {"reference": 1e-12, "absorbed": 1e-5, "expanded": 1e-5, "absorbed_bf16": 8e-3,
              "rotated": 1e-5}
    wrong = [f"{case}: {name} is off by {error(w[name], y):.2g}, more than {bound}"
             for name, bound in bounds.items() if not error(w[name], y) <= bound]
    if not error(w["rows"], rows) <= 1e-5:
        wrong.append(f"{case}: rows of the cache are off by {error(w['rows'], rows):.2g}")
    # Principal components: orthogonal, and the variances NumPy finds, the largest first.
    rank = case[3]
    u = w["pca"].reshape(rank, rank)
    centred = rows[:, :rank] - rows[:, :rank].mean(axis=0)
    covariance = centred.T @ centred / len(rows)
    if not np.abs(u.T @ u - np.eye(rank)).max() <= 1e-5:
        wrong.append(f"{case}: the PCA basis is not orthogonal")
    expected = np.linalg.eigvalsh(covariance)[::-1]
    if not np.abs(np.diag(u.T @ covariance @ u) - expected).max() <= 1e-5 * max(expected[0], 1):
        wrong.append(f"{case}: the PCA basis has other variances than NumPy's")
    return wrong


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wrong = [text for case in CASES for text in check(case, sys.argv[1])]
    print("\n".join(wrong) or f"{len(CASES)} layers agree with NumPy")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
