"""Draws problems at random, for dattn run and dattn decode, and lets NumPy judge what comes out.

    drawn.py [--from SEED] COUNT DATTN MPIRUN...

Judges are those of end_to_end.py and decode.py, with all that these look at: O, LSE, gradients, --check, plan against
run, bytes, messages, the cache. The problems are what nobody would think of: extents of 1, ranks without tokens or
heads, masks joined to others. A seed stands for its problem, on every machine; a failure prints it.
"""

import functools
import math
import pathlib
import random
import sys
import tempfile

import decode
import end_to_end
import jobs

NUMBERS = (1, 2, 3, 8, 16, 17, 31, 33, 48, 65)  # of a head


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def drawn_heads(draw):
    """Query, key and value heads."""
    key_heads = draw.choice((1, 1, 2, 3, 4))
    heads = key_heads * draw.choice((1, 1, 2, 3))
    return heads, key_heads, draw.choice((key_heads, key_heads, *divisors(heads)))


def neighbor(draw, keys):
    """A neighbourhood on a grid of one to three axes that has so many points."""
    dims = [draw.choice(divisors(keys))]
    dims.append(draw.choice(divisors(keys // dims[0])))
    dims = [n for n in (*dims, keys // math.prod(dims)) if n > 1] or [keys]
    dilation = [min(n, draw.choice((1, 1, 2, 3))) for n in dims]
    window = [draw.randint(1, n // step) for n, step in zip(dims, dilation)]
    settings = {
        "dims": dims,
        "window": window,
        "stride": [draw.randint(1, n) for n in window],
        "dilation": dilation,
        "causal": [draw.randint(0, 1) for _ in dims],
        "tile": [draw.randint(1, n) for n in dims],
    }
    return "neighbor:" + ",".join(f"{name}={'x'.join(map(str, n))}" for name, n in settings.items())


def drawn_mask(draw, keys, key_heads):
    """One mask, of any kind that needs no file."""
    few = lambda: draw.choice((0, 1, 2, 5, draw.randint(0, keys + 2)))
    edges = sorted((0, draw.randint(0, keys), draw.randint(0, keys), keys))
    documents = ",".join(str(b - a) for a, b in zip(edges, edges[1:]) if b > a)
    block, stride = draw.choice((1, 2, 5, 16)), draw.choice((1, 2, 3, 8))
    return draw.choice((
        "full",
        "causal",
        f"window:{few()},{few()}",
        f"documents:{documents}",
        f"prefix:{few()}",
        f"sink:{few()}",
        f"stream:sink={few()},recent={few()}",
        f"span:alpha={few()},beta=0.1,sink={few()},least=3,unit={block}",
        f"dilated:{few()},{few()},{draw.choice((1, 2, 7))}",
        f"s2:block={block},local=2,stride={stride},offset=1,step=1,dense={draw.randint(0, key_heads)}",
        f"s2:relative=1,block={block},local=2x1,stride={stride}",
        neighbor(draw, keys),
    ))  # fmt: skip


def drawn_masks(draw, keys, heads, key_heads):
    """Masks joined by and and or, for all heads or for two ranges of them."""

    def joined():
        masks = [drawn_mask(draw, keys, key_heads) for _ in range(draw.choice((1, 1, 2, 3)))]
        return "".join(draw.choice("+/") * (i > 0) + mask for i, mask in enumerate(masks))

    if heads == 1 or draw.random() < 0.6:
        return joined()
    cut = draw.randint(1, heads - 1)
    return f"{joined()}@0-{cut - 1};{joined()}@{cut}-{heads - 1}"


def drawn_run(draw):
    ranks = draw.randint(1, 8)
    strategy = draw.choice((*end_to_end.STRATEGIES, "auto")) if ranks > 1 else "local"
    keys = draw.choice((1, 2, ranks, ranks + 1, draw.randint(1, 40), draw.randint(1, 300)))
    queries = draw.choice((keys, keys, 1, draw.randint(1, 2 * keys)))
    heads, key_heads, value_heads = drawn_heads(draw)
    stored, dtype = draw.choice(("f4", "f4", "f2", "f8")), draw.choice(("auto", "auto", "bf16", "f8"))
    d_qk = draw.choice(NUMBERS)
    inputs = end_to_end.Inputs(queries, keys, heads, key_heads, value_heads, d_qk, draw.choice(NUMBERS), stored)
    exact = dtype == "f8" or (dtype == "auto" and stored == "f8")
    meshed = strategy in ("double_ring", "usp", "usp_inner_ring")
    rows = draw.choice(divisors(ranks))
    return end_to_end.Case(
        strategy,
        ranks,
        drawn_masks(draw, keys, heads, key_heads),
        draw.choice(end_to_end.PARTITIONS),
        inputs,
        mesh=f"{rows}x{ranks // rows}" if meshed else "",
        dtype=dtype,
        wire="exact" if exact else draw.choice(("exact", "exact", "bf16")),
        scale=draw.choice((1 / math.sqrt(d_qk), 0.0, -0.1)),  # said, so that LSE is judged by its size
        threads=draw.choice((1, 1, 2)),
        prefetch=draw.choice((0, 0, 1, 3)),
        twice=draw.random() < 0.3,
        gradients=draw.random() < 0.5,
    )


def drawn_decode(draw):
    ranks, form = draw.randint(1, 8), draw.choice(decode.FORMS)
    context = tuple(draw.choice((0, 1, ranks, draw.randint(0, 150))) for _ in range(draw.choice((1, 2, 5))))
    common = {
        "ranks": ranks,
        "dtype": draw.choice(("f4", "bf16")),
        "new": draw.choice((1, 2, 5, 17)),
        "context": context,
        "twice": draw.random() < 0.3,
    }
    if draw.random() < 0.3:
        latent = (draw.choice((7, 24)), draw.choice((0, 5)), draw.choice((4, 33)), draw.choice((1, 8)), 4, draw.choice((1, 7)))
        return decode.Case("latent-" + form, latent=latent, heads=draw.randint(1, 5), **common)
    heads, key_heads, value_heads = drawn_heads(draw)
    groups = draw.randint(1, len(context))
    tree = draw.choice(("", "", f"levels=1x{draw.randint(1, 80)}", f"levels={groups}x{draw.randint(1, 30)}"))
    rows = draw.choice(divisors(ranks))
    mesh = (rows, ranks // rows) if form in ("helix", "tree") and draw.random() < 0.5 else ()
    return decode.Case(
        form,
        mesh=mesh,
        heads=heads,
        key_heads=key_heads,
        value_heads=value_heads,
        d_qk=draw.choice(NUMBERS),
        d_v=draw.choice(NUMBERS),
        tree=tree,
        **common,
    )


def main(arguments):
    first = 1
    if arguments[:1] == ["--from"]:
        first, arguments = int(arguments[1]), arguments[2:]
    if len(arguments) < 3:
        sys.exit(__doc__)
    start = jobs.Starter(arguments[1], arguments[2:])
    with tempfile.TemporaryDirectory() as scratch:
        (pathlib.Path(scratch) / "decode").mkdir()
        runs = end_to_end.Bench(start, pathlib.Path(scratch))
        steps = decode.Bench(start, pathlib.Path(scratch) / "decode")
        work = []
        for seed in range(first, first + int(arguments[0])):
            draw = random.Random(seed)
            bench, case = (runs, drawn_run(draw)) if draw.random() < 0.65 else (steps, drawn_decode(draw))
            work.append((f"{seed}: {case.text()}", functools.partial(bench.judge, case)))
        sys.exit(1 if end_to_end.judge_all(work, "") else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
