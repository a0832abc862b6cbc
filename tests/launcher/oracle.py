"""Attention, its gradients and its masks in NumPy, from the definitions that `dattn list` prints, in float64.

Written without a look at the kernels: a mask here is a boolean matrix, attention is the textbook.
Query row i stands at position i + keys - queries; query head h reads key head h * key_heads //
heads, and value head likewise.
"""

import numpy


def allowed(words, queries, keys, heads):
    """Boolean [heads, queries, keys]: the pairs that the mask `words` allows."""
    q = numpy.arange(keys - queries, keys)[:, None]
    k = numpy.arange(keys)[None, :]
    table = numpy.zeros((heads, queries, keys), bool)
    for entry in words.split(";"):
        words_of_entry, at, which = entry.partition("@")
        first, _, last = which.partition("-") if at else ("0", "-", str(heads - 1))
        table[int(first) : int(last or first) + 1] = union(words_of_entry, q, k)
    return table


def union(words, q, k):
    return numpy.logical_or.reduce([intersection(part, q, k) for part in words.split("/")])


def intersection(words, q, k):
    return numpy.logical_and.reduce([primitive(part, q, k) for part in words.split("+")])


def primitive(words, q, k):
    name, _, text = words.partition(":")
    numbers = [int(n) for n in text.split(",")] if text else []
    true = numpy.ones((q.shape[0], k.shape[1]), bool)
    if name == "full":
        return true
    if name == "causal":
        return (k <= q) & true
    if name == "window":
        return (k >= q - numbers[0]) & (k <= q + numbers[1])
    if name == "prefix":
        return (k <= q) | ((k < numbers[0]) & true)
    if name == "sink":
        return (k < numbers[0]) & true
    if name == "documents":
        edges = numpy.cumsum(numbers)
        document = lambda p: numpy.searchsorted(edges, p, side="right")
        return (document(q) == document(k)) & (q >= 0)
    raise ValueError(words)


def bfloat16(x):
    """x in float32, rounded to the nearest number with 8 bits of fraction in all, ties to even."""
    bits = x.astype(numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(numpy.uint32).view(numpy.float32)


def attention(q, k, v, mask, scale):
    """O [queries, heads, value dim] and LSE [queries, heads]; `mask` is [heads, queries, keys]."""
    queries, heads, _ = q.shape
    q, k, v = (x.astype(numpy.float64) for x in (q, k, v))
    o = numpy.zeros((queries, heads, v.shape[2]))
    lse = numpy.full((queries, heads), -numpy.inf)
    for h in range(heads):
        scores = scale * (q[:, h] @ k[:, h * k.shape[1] // heads].T)
        scores[~mask[h]] = -numpy.inf
        top = scores.max(axis=1)
        some = numpy.isfinite(top)  # rows that see a key
        weights = numpy.exp(scores[some] - top[some, None])
        total = weights.sum(axis=1)
        o[some, h] = weights @ v[:, h * v.shape[1] // heads] / total[:, None]
        lse[some, h] = top[some] + numpy.log(total)
    return o, lse


def gradients(q, k, v, d_o, mask, scale):
    """dQ, dK, dV of sum(d_o * O), and for each the sizes of what cancels in it.

    With P the weights of a row: dV = P^T dO, and with dP = dO V^T the scores have the gradient
    dS = P (dP - rowsum(P dP)), from which dQ = scale dS K and dK = scale dS^T Q. Where a row sees one
    key P is 1 and dS is 0, in exact numbers only; the sizes are of the terms that should cancel there.
    """
    q, k, v, d_o = (x.astype(numpy.float64) for x in (q, k, v, d_o))
    found = [numpy.zeros(x.shape) for x in (q, k, v)]
    sizes = [numpy.zeros(x.shape) for x in (q, k, v)]
    heads = q.shape[1]
    for h in range(heads):
        kh, vh = h * k.shape[1] // heads, h * v.shape[1] // heads
        scores = numpy.where(mask[h], scale * (q[:, h] @ k[:, kh].T), -numpy.inf)
        top = scores.max(axis=1, keepdims=True)
        p = numpy.exp(scores - numpy.where(numpy.isfinite(top), top, 0))
        p /= numpy.maximum(p.sum(axis=1, keepdims=True), 1e-300)
        dp = d_o[:, h] @ v[:, vh].T
        delta = (p * dp).sum(axis=1, keepdims=True)
        ds = scale * p * (dp - delta)
        found[0][:, h] += ds @ k[:, kh]
        found[1][:, kh] += ds.T @ q[:, h]
        found[2][:, vh] += p.T @ d_o[:, h]
        single = mask[h].sum(axis=1, keepdims=True) == 1
        size = abs(scale) * p * (abs(dp) + abs(delta)) * single
        sizes[0][:, h] += size @ abs(k[:, kh])
        sizes[1][:, kh] += size.T @ abs(q[:, h])
    return found, sizes


def gradient_errors(found, want, sizes, mask):
    """Relative Frobenius error of dQ, dK and dV; infinite where a row without pairs is not 0."""
    heads = mask.shape[0]
    result = []
    for x, right, size, axis in zip(found, want, sizes, (2, 1, 1)):
        some = mask.any(axis=axis)  # [query heads, rows]: which have any pair
        some = some.reshape(x.shape[1], heads // x.shape[1], -1).any(axis=1).T
        if (x[~some] != 0).any():
            return (numpy.inf,) * 3
        norm = numpy.hypot(numpy.linalg.norm(right), numpy.linalg.norm(size)) or 1.0
        error = numpy.linalg.norm(x.astype(numpy.float64) - right) / norm
        result.append(numpy.inf if numpy.isnan(error) else float(error))
    return tuple(result)


def errors(o, lse, want_o, want_lse, large_scores=False):
    """Relative Frobenius error of O, largest error of LSE; infinite where the empty rows differ.

    The error of LSE is absolute. With `large_scores` it is relative above 1, because scores round
    in proportion to their size.
    """
    empty = numpy.isneginf(want_lse)
    if (numpy.isneginf(lse) != empty).any() or (o[empty] != 0).any():
        return numpy.inf, numpy.inf
    norm = numpy.linalg.norm(want_o) or 1.0
    o_error = numpy.linalg.norm(o.astype(numpy.float64) - want_o) / norm
    want = want_lse[~empty]
    distance = numpy.abs(lse[~empty].astype(numpy.float64) - want)
    if large_scores:
        distance /= numpy.maximum(1, numpy.abs(want))
    lse_error = distance.max(initial=0)
    # A NaN compares false with every bound, so it must not pass as small.
    return tuple(numpy.inf if numpy.isnan(e) else float(e) for e in (o_error, lse_error))
