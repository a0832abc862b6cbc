"""Draws problems at random, for dattn run and dattn decode, and lets NumPy judge what comes out.

    drawn.py [--from SEED] COUNT DATTN MPIRUN...

Judges are those of end_to_end.py and decode.py, with all that these look at: O, LSE, gradients, --check, plan against
run, bytes, messages, the cache. The problems are what nobody would think of: extents of 1, ranks without tokens or
heads, masks joined to others, rows of NaN, pretended hosts, ranks of uneven speed, pseudo-keys. A seed stands for its problem, on every
machine; a failure prints it.
"""

import dataclasses
import functools
import math
import os
import pathlib
import random
import sys
import tempfile

import numpy

import compensation
import decode
import decode_masks
import end_to_end
import jobs
import oracle

NUMBERS = (1, 2, 3, 8, 16, 17, 31, 33, 48, 65, 128, 257)  # of a head


@dataclasses.dataclass(frozen=True)
class Spoiled(end_to_end.Inputs):
    """Inputs of which some rows of some heads are NaN."""

    rows: tuple = ()  # (0, 1, 2 for Q, K, V; row; head)

    def clean(self):
        return super().arrays()

    def arrays(self):
        arrays = self.clean()
        for which, row, head in self.rows:
            arrays[which][row, head] = numpy.nan
        return arrays

    def name(self):
        return super().name().translate(str.maketrans("(), ", "----"))


@dataclasses.dataclass(frozen=True)
class Case(end_to_end.Case):
    hosts: str = ""
    windows: bool = True
    verified: bool = False
    speeds: str = ""

    def text(self):
        more = [f"speeds {self.speeds}"] * bool(self.speeds) + [f"hosts {self.hosts}"] * bool(self.hosts) + ["windows off"] * (not self.windows)
        more += ["verified"] * self.verified + [f"compensate {self.compensate}"] * (self.compensate != "off")
        more += [f"NaN at {self.inputs.rows}"] * bool(self.inputs.rows)
        return " ".join((super().text(), *more))

    def run_words(self):
        return [] if self.windows else ["--windows", "off"]

    def one_host(self):
        return not self.hosts and self.windows


class Surroundings:
    """What of a Case is said to run and plan, and not judged: no result and no byte may change."""

    def problem_words(self, case):
        words = super().problem_words(case) + (["--hosts", case.hosts] if case.hosts else [])
        words += ["--rank-speeds", case.speeds] if case.speeds else []
        return words + ["--verify-wire"] * (case.verified and self.has_digests)


class Compensated(Surroundings, compensation.Bench):
    pass


class Runs(Surroundings, end_to_end.Bench):
    def expected(self, case):
        """NaN reaches the rows that see it, and no others."""
        inputs = case.inputs
        if not inputs.rows:
            return super().expected(case)
        q, k, v, _ = inputs.clean()
        if case.computes_in() == "bf16":
            q, k, v = (oracle.bfloat16(x) for x in (q, k, v))
        table = oracle.allowed(case.mask, inputs.queries, inputs.keys, inputs.heads, inputs.key_heads)
        o, lse = oracle.attention(q, k, v, table, case.rules())
        for which, row, head in inputs.rows:
            for h in range(inputs.heads):
                if head != h * (inputs.heads, inputs.key_heads, inputs.value_heads)[which] // inputs.heads:
                    continue
                reached = table[h].any(axis=1) & (numpy.arange(inputs.queries) == row) if which == 0 else table[h, :, row]
                o[reached, h] = numpy.nan
                if which < 2:
                    lse[reached, h] = numpy.nan
        return (o, lse), None


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def drawn_heads(draw):
    """Query, key and value heads."""
    key_heads = draw.choice((1, 1, 2, 3, 4))
    heads = key_heads * draw.choice((1, 1, 2, 3, 5, 8))
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


def blocks(draw, keys, heads, key_heads):
    """A list of blocks, in files of the working folder."""
    size, lists = (draw.choice((1, 3, 16, keys)), draw.choice((1, 7, 32))), draw.choice((1, heads, key_heads))
    listed = numpy.random.default_rng(draw.getrandbits(30)).random((lists, -(-keys // size[0]), -(-keys // size[1]))) < 0.4
    rows = numpy.pad(listed.sum(-1).cumsum(-1), ((0, 0), (1, 0)))
    name = f"{draw.getrandbits(30):x}"
    numpy.save(f"rows{name}.npy", rows[0].astype("<i4") if lists == 1 else rows)
    numpy.save(f"columns{name}.npy", listed.nonzero()[2])
    return f"blocks:size={size[0]}x{size[1]},rows=rows{name}.npy,columns=columns{name}.npy"


def drawn_batch(draw):
    """A batch of sequences, which says how many queries and keys there are."""
    sequences, new = draw.randint(1, 12), draw.choice((1, 1, 2, 5))
    levels, groups = [], 1
    for _ in range(draw.choice((0, 1, 2))):
        groups = draw.choice([n for n in range(groups, sequences + 1) if n % groups == 0])
        levels.append(f"{groups}x{draw.randint(1, 40)}")
    words = f"batch:sequences={sequences},new={new}" + (",levels=" + ":".join(levels) if levels else "")
    least = new + draw.randint(0, 9)
    return words + draw.choice(("", f",suffix={least}", f",suffix={least},longest={least + 30},seed={draw.randint(0, 9)}"))


def drawn_masks(draw, keys, heads, key_heads):
    """Masks joined by and and or, for all heads or for two ranges of them."""

    def joined():
        masks = [drawn_mask(draw, keys, key_heads) for _ in range(draw.choice((1, 1, 2, 3)))]
        masks += [blocks(draw, keys, heads, key_heads)] if draw.random() < 0.1 else []
        words = "".join(draw.choice("+/") * (i > 0) + mask for i, mask in enumerate(masks))
        return f"({words}){draw.choice('+/')}{drawn_mask(draw, keys, key_heads)}" if draw.random() < 0.2 else words

    if heads == 1 or draw.random() < 0.6:
        return joined()
    cut = draw.randint(1, heads - 1)
    return f"{joined()}@0-{cut - 1};{joined()}@{cut}-{heads - 1}"


def drawn_hosts(draw, ranks):
    """None, or ranks on hosts in any order."""
    if ranks == 1 or draw.random() < 0.7:
        return ""
    cut = draw.randint(1, ranks - 1)
    rows = draw.choice(divisors(ranks))
    hosts = [draw.randint(0, 2) for _ in range(ranks)]
    numbered = {host: n for n, host in enumerate(dict.fromkeys(hosts))}  # from 0, as they come
    return draw.choice((f"{rows}x{ranks // rows}", f"{cut}+{ranks - cut}", ",".join(str(numbered[h]) for h in hosts)))


def drawn_rows(draw, inputs):
    """Some rows of Q, K and V."""
    extents = ((inputs.queries, inputs.heads), (inputs.keys, inputs.key_heads), (inputs.keys, inputs.value_heads))
    which = [draw.randrange(3) for _ in range(draw.randint(1, 3))]
    return tuple((n, draw.randrange(extents[n][0]), draw.randrange(extents[n][1])) for n in which)


def drawn_run(draw):
    ranks = draw.randint(1, 8)
    strategy = draw.choice((*end_to_end.STRATEGIES, "auto")) if ranks > 1 else "local"
    keys = draw.choice((1, 2, ranks, ranks + 1, draw.randint(1, 40), draw.randint(1, 300)))
    queries = draw.choice((keys, keys, 1, draw.randint(1, 2 * keys)))
    heads, key_heads, value_heads = drawn_heads(draw)
    masks = drawn_masks(draw, keys, heads, key_heads)
    if draw.random() < 0.1:
        masks = drawn_batch(draw)
        queries, keys = oracle.batch_lengths(masks)
    elif ranks > 1 and key_heads == value_heads > 1 and keys > 40 and draw.random() < 0.3:
        first = heads - heads // key_heads  # all heads of the last key head
        strategy, masks, queries = "mixed", f"window:2,0@0-{first - 1};causal@{first}-{heads - 1}", keys
    stored, dtype = draw.choice(("f4", "f4", "f2", "f8")), draw.choice(("auto", "auto", "bf16", "f8"))
    d_qk = draw.choice(NUMBERS)
    inputs = Spoiled(queries, keys, heads, key_heads, value_heads, d_qk, draw.choice(NUMBERS), stored)
    exact = dtype == "f8" or (dtype == "auto" and stored == "f8")
    meshed = strategy in ("double_ring", "usp", "usp_inner_ring")
    rows = draw.choice(divisors(ranks))
    case = Case(
        strategy,
        ranks,
        masks,
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
        hosts=drawn_hosts(draw, ranks),
        windows=draw.random() < 0.8,
        verified=draw.random() < 0.3,
    )
    if draw.random() < 0.25:
        case = dataclasses.replace(case, speeds=",".join(str(draw.choice((1, 1, 0.7, 0.5, 0.03))) for _ in range(ranks)))
    kind = draw.random()
    if kind < 0.1:
        spoiled = dataclasses.replace(inputs, rows=drawn_rows(draw, inputs))
        return dataclasses.replace(case, inputs=spoiled, gradients=False)
    if kind < 0.2 and queries < keys and case.partition != "balanced":
        return dataclasses.replace(case, compensate=draw.choice(("head", "rank")), gradients=False)
    if kind < 0.5:
        each = lambda least, most: ",".join(f"{draw.uniform(least, most):.3f}" for _ in range(heads))
        soft_cap, alibi, sinks = draw.choice((0.0, 0.3, 20.0)), draw.choice(("", "auto", each(-0.1, 1))), draw.choice(("", each(-3, 3)))
        told = dict(bias=draw.choice((0, 0, 1, 30)), weights=draw.random() < 0.3)
        if draw.random() < 0.3:
            sinks, told["sigmoid"] = "", draw.choice(("auto", "0.5", "-3"))
        return dataclasses.replace(case, soft_cap=soft_cap, alibi=alibi, sinks=sinks, **told)
    return case


def drawn_masked_decode(draw):
    """A case, and the words of its mask."""
    few = lambda: draw.randint(0, 40)
    masks = (
        "prefix:3",
        f"window:{few()},0",
        f"stream:sink={few()},recent={few() + 1}",
        f"span:beta={draw.random():.2f},sink={few()},least=4,unit=2",
        f"dilated:{few()},0,{draw.randint(1, 4)}",
        f"s2:block={draw.choice((1, 4, 7))},local={draw.randint(1, 3)},stride={draw.randint(1, 5)},step=1",
    )
    key_heads = draw.randint(1, 3)
    heads = key_heads * draw.randint(1, 3)
    words = draw.choice("+/").join(draw.choice(masks) for _ in range(draw.choice((1, 1, 2))))
    if heads > 1 and draw.random() < 0.5:
        words = f"{draw.choice(masks)}@0;{words}@1-{heads - 1}"
    ranks, form = draw.randint(1, 8), draw.choice(decode.FORMS)
    rows = draw.choice(divisors(ranks))
    case = decode.Case(
        form,
        ranks,
        dtype=draw.choice(("f4", "bf16")),
        new=draw.choice((1, 2, 5)),
        context=tuple(draw.choice((0, 1, draw.randint(0, 200))) for _ in range(draw.choice((1, 2, 5)))),
        mesh=(rows, ranks // rows) if form in ("helix", "tree") else (),
        heads=heads,
        key_heads=key_heads,
        value_heads=key_heads,
        more=("--mask", words),
    )
    return case, words


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
    if draw.random() < 0.4:
        latent = (draw.choice((7, 24)), draw.choice((0, 5)), draw.choice((4, 33)), draw.choice((1, 8)), 4, draw.choice((1, 7)))
        heads = draw.randint(1 if latent[5] > 1 else 4, 5)  # of a y made of one number bfloat16 leaves little where that nearly cancels
        slices = draw.choice([d for d in divisors(ranks) if d <= latent[2]])
        if draw.random() < 0.3:
            return decode.Case("latent-exact", latent=latent, heads=heads, slices=slices, **common)
        tree = draw.choice(("", f"levels=1x{draw.randint(1, 80)}"))
        return decode.Case("latent-" + form, latent=latent, heads=heads, tree=tree, **common)
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
        os.chdir(scratch)  # masks name their files from here
        folders = [pathlib.Path(scratch, name) for name in ("runs", "compensated", "decode", "masked")]
        for folder in folders:
            folder.mkdir()
        runs, compensated = Runs(start, folders[0]), Compensated(start, folders[1])
        steps, masked = decode.Bench(start, folders[2]), decode_masks.Bench(start, folders[3])
        runs.has_digests = compensated.has_digests = steps.has_digests
        work = []
        for seed in range(first, first + int(arguments[0])):
            draw = random.Random(seed)
            kind = draw.random()
            if kind < 0.65:
                case = drawn_run(draw)
                bench = runs if case.compensate == "off" else compensated
            elif kind < 0.9:
                bench, case = steps, drawn_decode(draw)
            else:
                bench = masked
                case, words = drawn_masked_decode(draw)
                masked.masks[case] = words, None
            work.append((f"{seed}: {case.text()}", functools.partial(bench.judge, case)))
        sys.exit(1 if end_to_end.judge_all(work, "") else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
