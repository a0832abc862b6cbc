"""Attention, its gradients and its masks in NumPy, from the definitions that `dattn list` prints, in float64.

Written without a look at the kernels: a mask here is a boolean matrix, attention is the textbook.
Query row i stands at position i + keys - queries; query head h reads key head h * key_heads //
heads, and value head likewise.
"""

import dataclasses
import math

import numpy


def allowed(words, queries, keys, heads, key_heads=None):
    """Boolean [heads, queries, keys]: the pairs that the mask `words` allows."""
    q = numpy.arange(keys - queries, keys)[:, None]
    k = numpy.arange(keys)[None, :]
    table = numpy.zeros((heads, queries, keys), bool)
    for entry in words.split(";"):
        words_of_entry, at, which = entry.partition("@")
        first, _, last = which.partition("-") if at else ("0", "-", str(heads - 1))
        for head in range(int(first), int(last or first) + 1):
            table[head] = union(words_of_entry, q, k, Head(head, heads, key_heads or heads))
    return table


class Head:
    """A query head: its number, and the key head that it reads."""

    def __init__(self, head, heads, key_heads):
        self.head, self.heads, self.key_heads = head, heads, key_heads
        self.key = head * key_heads // heads


def parts(words, separator):
    """What the separator parts, outside of parentheses."""
    found, depth = [""], 0
    for letter in words:
        depth += (letter == "(") - (letter == ")")
        if letter == separator and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def union(words, q, k, head):
    return numpy.logical_or.reduce([intersection(part, q, k, head) for part in parts(words, "/")])


def intersection(words, q, k, head):
    return numpy.logical_and.reduce([primitive(part, q, k, head) for part in parts(words, "+")])


def primitive(words, q, k, head):
    if words.startswith("("):
        return union(words[1:-1], q, k, head)
    name, _, text = words.partition(":")
    true = numpy.ones((q.shape[0], k.shape[1]), bool)
    named = {"stream": stream, "span": span, "s2": s2, "neighbor": neighbor, "batch": batch}
    if name in named:
        settings = dict(part.split("=") for part in text.split(",")) if text else {}
        return named[name](q, k, head, settings) & true
    if name == "blocks":
        return blocks(q, k, head, dict(part.split("=") for part in text.split(","))) & true
    numbers = [int(n) for n in text.split(",")] if text else []
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
    if name == "dilated":
        left, right, step = numbers
        return numpy.isin(k - q, step * numpy.arange(-left, right + 1))
    raise ValueError(words)


def stream(q, k, head, settings):
    """DuoAttention's streaming heads: sinks and the most recent keys."""
    sink, recent = int(settings.get("sink", 64)), int(settings.get("recent", 256))
    return (k <= q) & ((k < sink) | (q - k < recent))


def span(q, k, head, settings):
    """MoA: alpha + beta N keys of N, at least so many, a multiple of a unit; the sink is among them."""
    unit, sink = int(settings.get("unit", 64)), int(settings.get("sink", 64))
    wanted = math.ceil(float(settings.get("alpha", 0)) + float(settings.get("beta", 0)) * k.shape[1])
    kept = max(min(wanted, k.shape[1]), int(settings.get("least", 128)))
    kept = math.ceil(kept / unit) * unit
    return stream(q, k, head, {"sink": sink, "recent": max(0, kept - sink)})


def blocks(q, k, head, settings):
    """Block lists in CSR, from the files: offsets of each head's own list, columns head after head."""
    size = [int(n) for n in settings["size"].split("x")]
    rows, columns = (numpy.load(settings[name]) for name in ("rows", "columns"))
    lists = rows if rows.ndim == 2 else rows[None]
    number = {1: 0, head.heads: head.head, head.key_heads: head.key}[len(lists)]
    begin = lists[:number, -1].sum()
    listed = numpy.zeros((lists.shape[1] - 1, -(-k.shape[1] // size[-1])), bool)
    for block, (first, end) in enumerate(zip(lists[number], lists[number, 1:])):
        listed[block, columns[begin + first : begin + end]] = True
    return (q >= 0) & listed[numpy.maximum(q, 0) // size[0], k // size[-1]]


def s2(q, k, head, settings):
    """S2-Attention, from its reference's rule for blocks; all key heads have one shard each."""
    get = lambda name, otherwise: int(settings.get(name, otherwise))
    block, stride = get("block", 64), get("stride", 8)
    qb, kb = q // block, k // block
    dense = head.key >= head.key_heads - get("dense", 0)
    local = [int(n) for n in settings.get("local", "4").split("x")]
    if get("relative", 0):
        left, right = numpy.maximum(0, qb - kb - local[0] + 1), numpy.maximum(0, kb - qb - local[-1] + 1)
        return ((left + right) % stride == 0) | dense
    step = get("step", max(1, stride // head.heads))
    shard = (kb + head.key * step + get("offset", 0)) % stride == 0
    return (k <= q) & ((qb - kb < local[0]) | shard | dense)


def neighbor(q, k, head, settings):
    """NATTEN's reference mask on a grid, tokens in tiles; every axis by itself, all must allow it."""
    dims = [int(n) for n in settings["dims"].split("x")]

    def each(name, otherwise):
        values = [int(n) for n in settings.get(name, str(otherwise)).split("x")]
        return values * len(dims) if len(values) == 1 else values

    tile = each("tile", 1 << 40)
    points = numpy.stack(numpy.meshgrid(*[numpy.arange(n) for n in dims], indexing="ij"), -1).reshape(-1, len(dims))
    # Sorted by tile, then by what is left: the order of the tokens.
    order = numpy.lexsort([points[:, d] for d in reversed(range(len(dims)))] + [points[:, d] // tile[d] for d in reversed(range(len(dims)))])
    points = points[order]
    seen = numpy.broadcast_to(q >= 0, (q.shape[0], k.shape[1])).copy()
    for d, n in enumerate(dims):
        w, s, t, causal = each("window", 7)[d], each("stride", 1)[d], each("dilation", 1)[d], each("causal", 0)[d]
        x = points[numpy.maximum(q[:, 0], 0), d][:, None]
        y = points[k[0], d][None, :]
        count = n // t + (x % t < n % t)
        i, j = x // t, y // t
        if causal:
            leader = numpy.minimum(i // s * s + s - 1, count - 1)
            inside = (j >= numpy.maximum(leader - w + 1, 0)) & (j <= i)
        else:
            leader = numpy.minimum(i // s * s + s // 2, count - 1)
            begin = numpy.clip(leader - w // 2, 0, count - w)
            inside = (j >= begin) & (j < begin + w)
        seen &= inside & (x % t == y % t)
    return seen


def batch_suffixes(settings):
    """How many keys of its own each sequence has: as given, or drawn by splitmix64 of seed and number."""
    sequences, new = int(settings["sequences"]), int(settings.get("new", 1))
    given = [int(n) for n in settings.get("suffix", str(new)).split(":")]
    if len(given) > 1:
        return given
    word = (1 << 64) - 1

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) & word
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ x >> 27) * 0x94D049BB133111EB & word
        return x ^ x >> 31

    choices = int(settings.get("longest", given[0])) - given[0] + 1
    seed = int(settings.get("seed", 1))
    return [given[0] + mixed((seed << 20) + s) % choices for s in range(sequences)]


def batch_parts(settings):
    """Runs of keys in the order of memory: (first sequence, behind the last, keys), prefixes, then suffixes."""
    sequences = int(settings["sequences"])
    parts = []
    levels = [[int(n) for n in level.split("x")] for level in settings.get("levels", "").split(":") if level]
    sizes = [[int(n) for n in level.split("x")] for level in settings.get("sizes", "").split(":") if level]
    for n, (groups, *lengths) in enumerate(levels):
        counts = sizes[n] if sizes else [(g + 1) * sequences // groups - g * sequences // groups for g in range(groups)]
        edges = numpy.concatenate([[0], numpy.cumsum(counts)])
        parts += list(zip(edges[:-1], edges[1:], lengths * groups if len(lengths) == 1 else lengths))
    return parts, [(s, s + 1, n) for s, n in enumerate(batch_suffixes(settings))]


def batch(q, k, head, settings):
    """Hydragen: sequences that share prefixes; the last `new` keys of a suffix are the sequence's queries."""
    new = int(settings.get("new", 1))
    prefixes, suffixes = batch_parts(settings)
    column = lambda values: numpy.concatenate(values)[None, :]
    first = column([numpy.full(n, a) for a, _, n in prefixes + suffixes])
    behind = column([numpy.full(n, b) for _, b, n in prefixes + suffixes])
    # A prefix is older than any new token; a key of a suffix is as old as there are keys behind it.
    age = column([numpy.full(n, new) for *_, n in prefixes] + [numpy.arange(n)[::-1] for *_, n in suffixes])
    row = q - (first.size - len(suffixes) * new)
    sequence = row // new
    return (row >= 0) & (sequence >= first) & (sequence < behind) & (age >= new - 1 - row % new)


def batch_lengths(words):
    """Queries and keys of a batch mask."""
    settings = dict(part.split("=") for part in words.partition(":")[2].split(","))
    prefixes, suffixes = batch_parts(settings)
    return len(suffixes) * int(settings.get("new", 1)), int(sum(n for *_, n in prefixes + suffixes))


def bfloat16(x):
    """x in float32, rounded to the nearest number with 8 bits of fraction in all, ties to even."""
    bits = x.astype(numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(numpy.uint32).view(numpy.float32)


def published_slopes(heads):
    """ALiBi's, as Press et al. 2022 give them for a power of two, and interpolate between two of these."""
    below = 2 ** int(math.log2(heads))
    ratio = 2.0 ** (-8 / below)
    slopes = [ratio ** (i + 1) for i in range(below)]
    return slopes if below == heads else slopes + published_slopes(2 * below)[0::2][: heads - below]


def relative_bias(heads, reach):
    """A bias by relative distance [heads, 2 * reach + 1], the same at every call."""
    return numpy.random.default_rng(reach).standard_normal((heads, 2 * reach + 1)).astype("<f4")


def key_weights(keys, key_heads):
    """Log-weights of keys [keys, key heads], the same at every call; a sixth of them -inf."""
    random = numpy.random.default_rng(keys)
    weights = random.standard_normal((keys, key_heads)).astype("<f4")
    weights[random.random(weights.shape) < 1 / 6] = -numpy.inf
    return weights


@dataclasses.dataclass(frozen=True)
class Rules:
    """Scores: scale * q.k, then soft_cap * tanh(score / soft_cap), then less slope * distance, then plus what
    relative_bias() has for the distance and key_weights() for the key.

    `alibi` has a slope for each query head, `sinks` a score for each: of a key of value 0 that every row sees.
    `bias` is its heads and reach, `weights` are query and key heads. `sigmoid`: each key weighs
    1 / (1 + exp(-score - shift)) by itself, and O is the sum of weighted values.
    """

    scale: float
    soft_cap: float = 0.0
    alibi: tuple = ()
    sinks: tuple = ()
    bias: tuple = ()
    weights: tuple = ()
    sigmoid: float | None = None

    def scores(self, h, q, k, apart=None):
        """Of head h, [queries, keys], and their derivatives by q.k. `apart`: how far each key is behind each query;
        by default the last query stands at the last key."""
        score = self.scale * (q @ k.T)
        slope = numpy.full_like(score, self.scale)
        if self.soft_cap:
            t = numpy.tanh(score / self.soft_cap)
            score, slope = self.soft_cap * t, self.scale * (1 - t * t)
        if apart is None:
            apart = numpy.arange(len(k)) - numpy.arange(len(k) - len(q), len(k))[:, None]
        if self.alibi:
            score = score - float(numpy.float32(self.alibi[h])) * abs(apart)
        if self.bias:
            heads, reach = self.bias
            score = score + relative_bias(heads, reach)[h, numpy.clip(apart, -reach, reach) + reach]
        if self.weights:
            heads, key_heads = self.weights
            score = score + key_weights(len(k), key_heads)[:, h * key_heads // heads]
        return score, slope

    def sigmoid_of(self, score):
        with numpy.errstate(over="ignore"):
            return 1 / (1 + numpy.exp(-score - self.sigmoid))

    def sink(self, h):
        return float(numpy.float32(self.sinks[h])) if self.sinks else -numpy.inf


def attention(q, k, v, mask, rules, apart=None):
    """O [queries, heads, value dim] and LSE [queries, heads]; `mask` is [heads, queries, keys]; `apart` as in Rules."""
    queries, heads, _ = q.shape
    q, k, v = (x.astype(numpy.float64) for x in (q, k, v))
    o = numpy.zeros((queries, heads, v.shape[2]))
    lse = numpy.full((queries, heads), -numpy.inf)
    for h in range(heads):
        scores, _ = rules.scores(h, q[:, h], k[:, h * k.shape[1] // heads], apart)
        scores[~mask[h]] = -numpy.inf
        if rules.sigmoid is not None:
            weights = rules.sigmoid_of(scores)
            o[:, h] = weights @ v[:, h * v.shape[1] // heads]
            with numpy.errstate(divide="ignore"):
                lse[:, h] = numpy.log(weights.sum(axis=1))
            continue
        top = numpy.maximum(scores.max(axis=1), rules.sink(h))
        some = numpy.isfinite(top)  # rows that see a key, or a sink
        weights = numpy.exp(scores[some] - top[some, None])
        total = weights.sum(axis=1) + numpy.exp(rules.sink(h) - top[some])
        o[some, h] = weights @ v[:, h * v.shape[1] // heads] / total[:, None]
        lse[some, h] = top[some] + numpy.log(total)
    return o, lse


def owners(partition, keys, ranks):
    """The rank that owns each key of a problem with fewer queries, as `dattn list` deals them out."""
    at = numpy.arange(keys)
    if partition == "striped":
        return at % ranks
    pieces = 2 * ranks if partition == "zigzag" else ranks
    ends = numpy.arange(1, pieces + 1) * keys // pieces
    piece = numpy.searchsorted(ends, at, side="right")
    return numpy.minimum(piece, 2 * ranks - 1 - piece) if partition == "zigzag" else piece


def compensated(q, k, v, mask, rules, dropped, owner):
    """attention() where means stand for the keys `dropped` [key heads, keys], one for each `owner` of some.

    RazorAttention: O = (N exp(q.kc) vc + sum exp(q.k) v) / (N exp(q.kc) + sum exp(q.k)), with kc and vc
    the means of N dropped keys and of their values; one such term for each owner.
    """
    queries, heads, _ = q.shape
    q, k, v = (x.astype(numpy.float64) for x in (q, k, v))
    o = numpy.zeros((queries, heads, v.shape[2]))
    lse = numpy.full((queries, heads), -numpy.inf)
    for h in range(heads):
        kh, vh = h * k.shape[1] // heads, h * v.shape[1] // heads
        terms = [numpy.where(mask[h], numpy.exp(rules.scores(h, q[:, h], k[:, kh])[0]), 0.0)]
        values = [v[:, vh]]
        for rank in numpy.unique(owner[dropped[kh]]):
            mine = dropped[kh] & (owner == rank)
            score, _ = rules.scores(h, q[:, h], k[mine, kh].mean(axis=0)[None])
            terms.append(mine.sum() * numpy.exp(score))
            values.append(v[mine, vh].mean(axis=0)[None])
        total = sum(term.sum(axis=1) for term in terms) + numpy.exp(rules.sink(h))
        some = total > 0
        o[some, h] = sum(term @ value for term, value in zip(terms, values))[some] / total[some, None]
        lse[some, h] = numpy.log(total[some])
    return o, lse


def gradients(q, k, v, d_o, mask, rules):
    """dQ, dK, dV of sum(d_o * O), and for each the sizes of what cancels in it.

    With P the weights of a row: dV = P^T dO, and with dP = dO V^T the scores have the gradient
    dS = P (dP - rowsum(P dP)), from which dQ = scale dS K and dK = scale dS^T Q, or with the derivatives
    of the rules in place of the scale; of a sigmoid dS = P (1 - P) dP. Where a row sees one key, and no sink, P is 1 and dS is 0, in
    exact numbers only; the sizes are of the terms that should cancel there.
    """
    q, k, v, d_o = (x.astype(numpy.float64) for x in (q, k, v, d_o))
    found = [numpy.zeros(x.shape) for x in (q, k, v)]
    sizes = [numpy.zeros(x.shape) for x in (q, k, v)]
    heads = q.shape[1]
    for h in range(heads):
        kh, vh = h * k.shape[1] // heads, h * v.shape[1] // heads
        scores, slope = rules.scores(h, q[:, h], k[:, kh])
        scores = numpy.where(mask[h], scores, -numpy.inf)
        top = numpy.maximum(scores.max(axis=1, keepdims=True), rules.sink(h))
        top = numpy.where(numpy.isfinite(top), top, 0)
        p = numpy.exp(scores - top)
        p /= numpy.maximum(p.sum(axis=1, keepdims=True) + numpy.exp(rules.sink(h) - top), 1e-300)
        dp = d_o[:, h] @ v[:, vh].T
        delta = (p * dp).sum(axis=1, keepdims=True)
        ds = slope * p * (dp - delta)
        if rules.sigmoid is not None:
            p = rules.sigmoid_of(scores)
            ds = slope * p * (1 - p) * dp
        found[0][:, h] += ds @ k[:, kh]
        found[1][:, kh] += ds.T @ q[:, h]
        found[2][:, vh] += p.T @ d_o[:, h]
        single = (numpy.isfinite(scores).sum(axis=1, keepdims=True) == 1) & (not rules.sinks)
        single &= rules.sigmoid is None
        size = abs(slope) * p * (abs(dp) + abs(delta)) * single
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
    """Relative Frobenius error of O, largest error of LSE; infinite where the empty rows differ, or NaN.

    The error of LSE is absolute. With `large_scores` it is relative above 1, because scores round
    in proportion to their size.
    """
    empty = numpy.isneginf(want_lse)
    if (numpy.isneginf(lse) != empty).any() or (o[empty] != 0).any():
        return numpy.inf, numpy.inf
    for found, want in ((o, want_o), (lse, want_lse)):
        if (numpy.isnan(found) != numpy.isnan(want)).any():
            return numpy.inf, numpy.inf
    o, want_o, lse, want_lse = (numpy.where(numpy.isnan(x), 0, x) for x in (o, want_o, lse, want_lse))
    norm = numpy.linalg.norm(want_o) or 1.0
    o_error = numpy.linalg.norm(o.astype(numpy.float64) - want_o) / norm
    want = want_lse[~empty]
    distance = numpy.abs(lse[~empty].astype(numpy.float64) - want)
    if large_scores:
        distance /= numpy.maximum(1, numpy.abs(want))
    return float(o_error), float(distance.max(initial=0))
