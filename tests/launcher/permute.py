"""Runs dattn permute and lets NumPy judge the order; then attention on a grid, with tiles and without.

    permute.py DATTN MPIRUN...
"""

import itertools
import pathlib
import sys
import tempfile

import numpy

import jobs
from end_to_end import BOUND, Trouble, judge_all, require

GRIDS = (
    ("11", "3"),
    ("12x10", "4x5"),
    ("7x5", "2x3"),
    ("7x5", "3"),
    ("4x6", "9x9"),  # one tile: nothing moves
    ("5x4x7", "2x3x4"),
    ("1x1x1", "1"),
    ("64x48", "8x8"),
)
KINDS = (("<f4", (3, 8)), ("<f2", ()), ("<f8", (5,)), ("<i4", (2, 1, 3)), ("<i8", (4,)), ("<f4", (2, 0)))


def lengths(words):
    return [int(n) for n in words.split("x")]


def order(dims, tile):
    """The row of each token of the tiled order: a grid of row numbers, cut into tiles."""
    dims = lengths(dims)
    tile = lengths(tile) * (len(dims) if "x" not in tile else 1)
    rows = numpy.arange(numpy.prod(dims)).reshape(dims)
    corners = itertools.product(*(range(0, n, t) for n, t in zip(dims, tile)))
    return numpy.concatenate([rows[tuple(slice(c, c + t) for c, t in zip(corner, tile))].ravel() for corner in corners])


class Bench:
    def __init__(self, start, scratch):
        self.start, self.scratch, self.count = start, scratch, itertools.count()

    def permute(self, source, dims, tile, *more):
        target = self.scratch / f"{next(self.count)}.npy"
        words = ["permute", "--dims", dims, "--tile", tile, "--in", str(source), "--out", str(target), *more]
        done = self.start.run(words)
        require(done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
        require(done.stdout.count("\n") == 1 and "tokens of a grid" in done.stdout, f"it says {done.stdout}")
        return target

    def moves(self, dims, tile, kind, shape):
        tokens = numpy.prod(lengths(dims))
        numbers = numpy.random.default_rng(tokens).integers(0, 60000, (tokens, *shape))
        source = self.scratch / f"{next(self.count)}.npy"
        numpy.save(source, numbers.astype(kind))
        there = self.permute(source, dims, tile)
        back = self.permute(there, dims, tile, "--inverse")
        want = self.scratch / f"{next(self.count)}.npy"
        numpy.save(want, numbers.astype(kind)[order(dims, tile)])
        require(there.read_bytes() == want.read_bytes(), "the order is not NumPy's")
        require(back.read_bytes() == source.read_bytes(), "there and back is not the same file")

    def attends(self, dims, tile, settings, ranks):
        """Row by row without tiles, and permuted, with tiles, permuted back: the same O and LSE."""
        tokens = numpy.prod(lengths(dims))
        random = numpy.random.default_rng(tokens)
        files = {}
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            files[name] = self.scratch / f"{next(self.count)}.npy"
            numpy.save(files[name], random.standard_normal((tokens, heads, 16)).astype("<f4"))
        mask = f"neighbor:dims={dims},{settings}"
        plain = self.run(files, mask, ranks)
        tiled = self.run({n: self.permute(f, dims, tile) for n, f in files.items()}, f"{mask},tile={tile}", ranks)
        for name, got, want in zip(("O", "LSE"), tiled, plain):
            got = numpy.load(self.permute(got, dims, tile, "--inverse"))
            want = numpy.load(want)
            error = numpy.linalg.norm(got - want) / numpy.linalg.norm(want)
            require(error <= BOUND["f4"], f"{name} is {error:.3g} off")

    def run(self, files, mask, ranks):
        out = [self.scratch / f"{next(self.count)}.npy" for _ in range(2)]
        words = ["run", "--mask", mask, "--threads", "1", "--out", str(out[0]), "--lse", str(out[1])]
        done = self.start.run(words + [w for n, f in files.items() for w in (f"--{n}", str(f))], ranks)
        require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr}")
        return out


def judged(what, *arguments):
    try:
        what(*arguments)
    except Trouble as trouble:
        return str(trouble)
    return None


def main(arguments):
    if len(arguments) < 2:
        sys.exit(__doc__)
    start = jobs.Starter(arguments[0], arguments[1:])
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(start, pathlib.Path(scratch))
        table = [(bench.moves, *grid, *kind) for grid in GRIDS for kind in KINDS]
        table.append((bench.moves, "64x48", "8x5", "<f4", (1024,)))  # more than is held at a time
        table.append((bench.moves, "3x2", "2x1", "<f8", (2 << 20,)))  # a row, too
        table += [
            (bench.attends, "12x10", "4x5", "window=5", 1),
            (bench.attends, "7x9", "2x4", "window=3x5,stride=2x1", 3),
            (bench.attends, "5x4x6", "2x3x4", "window=3,causal=1x0x0", 4),
        ]
        work = [(" ".join(map(str, [r[0].__name__, *r[1:]])), lambda r=r: judged(*r)) for r in table]
        sys.exit(1 if judge_all(work, "") else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
