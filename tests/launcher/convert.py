"""Has NumPy recompute what dattn convert writes: the GQA layer from its input, the latent layer from
the written files, and both errors that the command reports.

    convert.py DATTN MPIRUN...
"""

import json
import math
import pathlib
import sys
import tempfile

import numpy

import jobs

# hidden, heads, kv heads, head dim, kv rank, d_rope, freqfold, pairs, exact, element type
CASES = [
    (40, 6, 3, 8, 24, 24, 0, "halves", True, "f4"),
    (40, 6, 3, 8, 24, 24, 1, "neighbours", True, "f8"),
    (48, 4, 1, 16, 16, 16, 1, "halves", True, "f4"),
    (64, 8, 4, 16, 32, 8, 0, "halves", False, "f2"),
    (64, 8, 4, 16, 40, 16, 4, "neighbours", False, "f4"),
    (64, 4, 4, 16, 30, 32, 1, "halves", False, "f4"),
]
ROPE_BASE = 500.0
TOKENS, HELD_OUT = 150, 21


def rope(x, frequencies, halves):
    """x [tokens, heads, 2 * frequencies] turned by position, pairs as complex numbers."""
    pairs = len(frequencies)
    z = x[..., :pairs] + 1j * x[..., pairs:] if halves else x[..., 0::2] + 1j * x[..., 1::2]
    z = z * numpy.exp(1j * numpy.multiply.outer(numpy.arange(len(x)), frequencies))[:, None]
    if halves:
        return numpy.concatenate([z.real, z.imag], axis=-1)
    return numpy.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def attend(q, k, v, scale):
    """Causal attention; q, k, v [tokens, heads, dim]."""
    scores = scale * numpy.einsum("qhd,nhd->hqn", q, k)
    scores = numpy.where(numpy.tri(len(q), dtype=bool), scores, -numpy.inf)
    p = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
    return numpy.einsum("hqn,nhd->qhd", p / p.sum(axis=-1, keepdims=True), v)


def gqa_layer(w, x, heads, kv_heads, dim, halves):
    frequencies = ROPE_BASE ** (-2.0 * numpy.arange(dim // 2) / dim)
    q = (x @ w["q"].T).reshape(len(x), heads, dim)
    k = (x @ w["k"].T).reshape(len(x), kv_heads, dim)
    v = (x @ w["v"].T).reshape(len(x), kv_heads, dim)
    of_query = numpy.arange(heads) // (heads // kv_heads)
    k, v = rope(k, frequencies, halves)[:, of_query], v[:, of_query]
    o = attend(rope(q, frequencies, halves), k, v, 1 / math.sqrt(dim))
    return o.reshape(len(x), -1) @ w["o"].T


def latent_shapes(s):
    """The matrices of a layer of these sizes, by name."""
    queries = {"down_q": (s["model"], s["q_rank"]), "q_gamma": (s["q_rank"],)} if s["q_rank"] else {}
    return {
        **queries,
        "down_kv": (s["model"], s["kv_rank"] + s["d_rope"]),
        "kv_gamma": (s["kv_rank"],),
        "up_q": (s["q_rank"] or s["model"], s["heads"], s["d_nope"] + s["d_rope"]),
        "up_k": (s["heads"], s["kv_rank"], s["d_nope"]),
        "up_v": (s["heads"], s["kv_rank"], s["d_v"]),
        "out": (s["heads"], s["d_v"], s["model"]),
    }


def latent_rope(s):
    """Radians a position of each pair of d_rope, what YaRN multiplies cosine and sine by, and the scale of scores."""
    turned = s["d_rope"] // s["rope_copies"]
    pairs = numpy.arange(turned // 2)
    plain = s["rope_base"] ** (-2.0 * pairs / turned)
    scale = 1 / math.sqrt(s["d_nope"] + s["d_rope"])
    factor = s.get("rope_factor", 1)
    if factor == 1:
        return numpy.tile(plain, s["rope_copies"]), 1.0, scale
    def pair_with(turns):
        return turned * math.log(s["rope_original"] / (turns * 2 * math.pi)) / (2 * math.log(s["rope_base"]))
    low = max(math.floor(pair_with(s["beta_fast"])), 0)
    high = min(math.ceil(pair_with(s["beta_slow"])), turned - 1)
    slowed = numpy.clip((pairs - low) / (high - low if high != low else 0.001), 0, 1)
    grown = [0.1 * s[name] * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")]
    frequencies = plain / factor * slowed + plain * (1 - slowed)
    return numpy.tile(frequencies, s["rope_copies"]), grown[0] / grown[1], scale * grown[1] ** 2


def latent_parts(folder, prefix, x, stored):
    """q, k and v of all heads, the scale and W_O by the files of a layer, each matrix as `stored(name, array)` holds it, and the sizes they give."""
    s = json.loads((folder / f"{prefix}.json").read_text())
    w = {name: numpy.load(folder / f"{prefix}.{name}.npy") for name in latent_shapes(s)}
    for name, shape in latent_shapes(s).items():
        if w[name].shape != shape:
            raise AssertionError(f"{name} is {w[name].shape}; want {shape}")
    w = {name: stored(name, array.astype(numpy.float32)).astype(numpy.float64) for name, array in w.items()}
    frequencies, magnitude, scale = latent_rope(s)
    c = x @ w["down_kv"]
    latent, key = c[:, : s["kv_rank"]], c[:, s["kv_rank"]:]
    def normed(rows, gamma):
        return rows / numpy.sqrt(numpy.mean(rows**2, axis=1, keepdims=True) + s["epsilon"]) * gamma
    latent = normed(latent, w["kv_gamma"])
    from_ = normed(x @ w["down_q"], w["q_gamma"]) if s["q_rank"] else x
    q = numpy.einsum("nm,mhd->nhd", from_, w["up_q"])
    d_nope = s["d_nope"]
    q = numpy.concatenate([q[..., :d_nope], magnitude * rope(q[..., d_nope:], frequencies, False)], axis=-1)
    key = magnitude * numpy.repeat(rope(key[:, None], frequencies, False), s["heads"], axis=1)
    k = numpy.concatenate([numpy.einsum("nr,hrd->nhd", latent, w["up_k"]), key], axis=-1)
    v = numpy.einsum("nr,hrd->nhd", latent, w["up_v"])
    return q, k, v, scale, w["out"], s


def latent_layer(folder, prefix, x, stored=lambda name, array: array):
    """y by the files of a layer alone, and the sizes they give."""
    q, k, v, scale, out, s = latent_parts(folder, prefix, x, stored)
    return numpy.einsum("nhd,hdm->nm", attend(q, k, v, scale), out), s


def latent_lse(folder, prefix, x, stored=lambda name, array: array):
    """The LSE of its attention [tokens, heads]."""
    q, k, _, scale, *_ = latent_parts(folder, prefix, x, stored)
    scores = scale * numpy.einsum("qhd,nhd->qhn", q, k)
    scores = numpy.where(numpy.tri(len(q), dtype=bool)[:, None], scores, -numpy.inf)
    return numpy.logaddexp.reduce(scores, axis=-1)


def check(start, folder, case):
    """What is wrong with one case, as a list."""
    hidden, heads, kv_heads, dim, kv_rank, d_rope, fold, pairs, exact, element = case
    random = numpy.random.default_rng(7)
    # Heads alike but for some, and tokens of few directions: there is something to find.
    shared = random.normal(size=(1, dim, hidden))
    shapes = {"q": (heads * dim, hidden), "o": (hidden, heads * dim)}
    w = {name: random.normal(size=shape) / math.sqrt(shape[1]) for name, shape in shapes.items()}
    for name in "kv":
        own = random.normal(size=(kv_heads, dim, hidden))
        w[name] = (shared + 0.3 * own).reshape(kv_heads * dim, hidden) / math.sqrt(hidden)
    x = random.normal(size=(TOKENS, hidden)) * (1 + numpy.arange(hidden)) ** -0.5
    w["x"] = 3 * x
    for name, array in w.items():
        w[name] = array.astype(element)
        numpy.save(folder / f"{name}.npy", w[name])
        w[name] = w[name].astype(numpy.float32).astype(numpy.float64)
    words = f"convert --q-proj q.npy --k-proj k.npy --v-proj v.npy --o-proj o.npy --heads {heads} --kv-heads {kv_heads}"
    words += f" --rope-base {ROPE_BASE} --pairs {pairs} --kv-rank {kv_rank} --rope-dim {d_rope} --freqfold {fold}"
    words += f" --calibration x.npy --held-out {HELD_OUT} --out made --json made_report.json"
    done = start.run(words.split(), 0, {"OMP_NUM_THREADS": "1"}, cwd=folder)
    if done.returncode != 0:
        return [f"{case}: exit code {done.returncode}: {done.stdout}{done.stderr}"]
    report = json.loads((folder / "made_report.json").read_text())
    held_out = w["x"][TOKENS - HELD_OUT:]
    expected = gqa_layer(w, held_out, heads, kv_heads, dim, pairs == "halves")
    found, sizes = latent_layer(folder, "made", held_out)
    error = numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected)
    wrong = []
    for path in folder.glob("made.*.npy"):
        if numpy.load(path).dtype != numpy.float32:
            wrong.append(f"{case}: {path.name} is not float32")
    said = report["steps"][-1]["error"]
    if not abs(said - error) <= 1e-9 + 1e-3 * error:
        wrong.append(f"{case}: the error is {error:.3e}, the command says {said:.3e}")
    if exact and not error <= 1e-5:
        wrong.append(f"{case}: the error is {error:.3e}; this conversion is exact")
    if not exact and not 1e-5 < error < 0.9:
        wrong.append(f"{case}: the error is {error:.3e}; this conversion loses some, and not all")
    if not all(step["error"] <= 1e-5 for step in report["steps"][:2]):
        wrong.append(f"{case}: merge and RoRoPE are off by {report['steps'][:2]}")
    if (sizes["kv_rank"], sizes["d_rope"]) != (kv_rank, d_rope):
        wrong.append(f"{case}: it has the sizes {sizes}")
    return wrong


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    start = jobs.Starter(sys.argv[1], sys.argv[2:])
    wrong = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            wrong += check(start, pathlib.Path(folder), case)
    print("\n".join(wrong) or f"{len(CASES)} conversions agree with NumPy")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
