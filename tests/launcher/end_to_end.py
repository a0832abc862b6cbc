"""Runs the dattn command on files and lets NumPy judge what comes out.

    end_to_end.py [--only TEXT] small|large DATTN MPIRUN...

small covers strategies, partitions, masks, rank counts, head counts, dtypes and reports; large is
one problem of 8192 tokens. --only runs the cases whose line holds TEXT. MPIRUN... is mpirun with
its options; the test adds -np.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import threading

import numpy

import jobs
import oracle

# The bounds. float32: what kernels/README.md promises; float64 sums in the oracle's own precision.
BOUND = {"bf16": 4e-3, "f4": 1e-6, "f8": 1e-13}
GRADIENT_BOUND = {"bf16": 8e-3, "f4": 3e-6, "f8": 1e-13}

STRATEGIES = (
    "ring",
    "gather",
    "lightseq",
    "double_ring",
    "ulysses",
    "usp",
    "usp_inner_ring",
    "tree",
)
PARTITIONS = ("contiguous", "zigzag", "striped", "balanced")
RANKS = (2, 3, 4, 5, 7, 8)
MASKS = (
    "full",
    "causal",
    "window:100,7",
    "documents:300,9,298",
    "documents:300,9,298+causal",
    "prefix:50",
    "window:64,0/sink:4",
    "causal@0-3;window:32,0@4-5",
    "sink:4",
    "documents:300,9,298+window:0,40",
    "documents:300,9,298+sink:4",  # rows past the first document see nothing
    "full@0;causal@1;window:5,5@2-3;prefix:500@4;documents:1,605,1@5",
    "s2:block=16,local=2,stride=4,step=2@0-3;stream:sink=4,recent=60@4;dilated:20,3,7@5",
    "neighbor:dims=607,window=30,stride=4@0-2;s2:relative=1,block=20,local=2x1,stride=5@3-4;span:beta=0.2,sink=9@5",
)
BATCHES = (
    "batch:sequences=7,suffix=9,longest=60,seed=3",
    "batch:sequences=23,new=2,levels=1x211:3x40x70x10,suffix=5",
    "batch:sequences=9,new=3,levels=1x100:2x55:4x31,sizes=9:4x5:1x3x2x3,suffix=3:20:8:33:4:150:9:9:12",
    "batch:sequences=40,levels=1x500@0-3;full@4-5",
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Which Q, K, V and dO: their shapes, their type, and the seed of the numbers."""

    queries: int = 607
    keys: int = 607
    heads: int = 6
    key_heads: int = 2
    value_heads: int = 2
    d_qk: int = 64
    d_v: int = 48
    stored: str = "f4"

    def arrays(self):
        random = numpy.random.default_rng([self.queries, self.keys, self.d_qk])
        shapes = (
            (self.queries, self.heads, self.d_qk),
            (self.keys, self.key_heads, self.d_qk),
            (self.keys, self.value_heads, self.d_v),
            (self.queries, self.heads, self.d_v),
        )
        return [random.standard_normal(s).astype("<" + self.stored) for s in shapes]

    def name(self):
        return "_".join(str(field) for field in dataclasses.astuple(self))


BASE = Inputs()


@dataclasses.dataclass(frozen=True)
class Case:
    strategy: str
    ranks: int  # 1 runs without mpirun
    mask: str = "full"
    partition: str = "auto"
    inputs: Inputs = BASE
    mesh: str = ""
    dtype: str = "auto"
    wire: str = "exact"
    scale: float | None = None
    soft_cap: float = 0.0
    alibi: str = ""
    sinks: str = ""
    bias: int = 0  # the reach of a bias by relative distance
    weights: bool = False  # of keys
    sigmoid: str = ""  # auto, or a number
    threads: int = 1
    prefetch: int = 0  # 0: the forecast's choice
    relay: bool | None = None  # nothing: likewise
    twice: bool = False  # the second run must give the same bytes
    gradients: bool = True
    short: int | None = None  # bytes a rank lacks to keep what the forward pass redistributed
    compensate: str = "off"  # anything else is for compensation.py

    def text(self):
        i = self.inputs
        return (
            f"P={self.ranks} {self.strategy} {self.mesh} {self.partition} '{self.mask}' "
            f"queries {i.queries} keys {i.keys} heads {i.heads}:{i.key_heads}:{i.value_heads} "
            f"{i.stored}->{self.dtype} wire {self.wire} scale {self.scale} threads {self.threads} "
            f"prefetch {self.prefetch}"
            + (f" soft cap {self.soft_cap}" if self.soft_cap else "")
            + (f" alibi {self.alibi}" if self.alibi else "")
            + (f" sinks {self.sinks}" if self.sinks else "")
            + (f" bias {self.bias}" if self.bias else "")
            + (" key weights" if self.weights else "")
            + (f" sigmoid {self.sigmoid}" if self.sigmoid else "")
            + ("" if self.short is None else f" memory short of {self.short}")
        )

    def run_words(self):
        """What dattn plan does not take."""
        return []

    def one_host(self):
        """Whether all ranks look at each other's memory."""
        return True

    def expects(self):
        """What O, LSE and gradients depend on."""
        return self.inputs, self.mask, self.rules(), self.computes_in() == "bf16"

    def rules(self):
        heads = self.inputs.heads
        each = lambda words: tuple(map(float, words.split(","))) * (1 if "," in words or heads == 1 else heads)
        alibi = tuple(oracle.published_slopes(heads)) if self.alibi == "auto" else each(self.alibi) if self.alibi else ()
        scale = 1 / math.sqrt(self.inputs.d_qk) if self.scale is None else self.scale
        return oracle.Rules(
            scale,
            self.soft_cap,
            alibi,
            each(self.sinks) if self.sinks else (),
            (heads, self.bias) if self.bias else (),
            (heads, self.inputs.key_heads) if self.weights else (),
            -math.log(self.inputs.keys) if self.sigmoid == "auto" else float(self.sigmoid) if self.sigmoid else None,
        )

    def computes_in(self):
        if self.dtype != "auto":
            return self.dtype
        return "f8" if self.inputs.stored == "f8" else "f4"

    def rounds_to(self):
        """What bounds O and gradients; of LSE no digit is lost on the wire."""
        return "bf16" if self.wire == "bf16" else self.computes_in()

    def delivers(self):
        return numpy.dtype("<f4" if self.computes_in() == "bf16" else "<" + self.computes_in())


def small_cases():
    cases = []
    # Every mask and every partition with every strategy, each pair at several rank counts.
    for s, strategy in enumerate(STRATEGIES):
        for m, mask in enumerate(MASKS):
            ranks = RANKS[(s + m + m // 4) % len(RANKS)]
            cases.append(Case(strategy, ranks, mask, PARTITIONS[m % len(PARTITIONS)]))
    for mask in MASKS:
        cases.append(Case("local", 1, mask))
    # Grids, tokens in tiles.
    grid = dataclasses.replace(BASE, queries=600, keys=600)
    flat = "neighbor:dims=20x30,window=7x5,stride=2x1,dilation=1x3,causal=0x1,tile=8x7"
    deep = "neighbor:dims=5x10x12,window=3x5x4,stride=1x5x2,tile=2x4x4@0-3;stream:sink=30,recent=100@4-5"
    for strategy, ranks, mask in (("ring", 3, flat), ("gather", 5, deep), ("lightseq", 4, flat), ("ulysses", 3, deep)):
        cases.append(Case(strategy, ranks, mask, inputs=grid))
    # Heads that differ: placed by cost, which leaves gaps between the heads of a rank; mixed.
    apart = "causal@0-2;window:9,0@3-5"
    for n, ranks in enumerate((1,) + RANKS):
        dtype = ("f4", "bf16", "f8")[n % 3]
        cases.append(Case("mixed", ranks, apart, PARTITIONS[n % 4], dtype=dtype))
        cases.append(Case("ulysses", ranks, apart, PARTITIONS[(n + 1) % 4], dtype=dtype))
    for strategy, mesh in (("usp", "2x2"), ("usp_inner_ring", "2x3")):
        cases.append(Case(strategy, 4 if mesh == "2x2" else 6, apart, "zigzag", mesh=mesh))
    cases.append(Case("auto", 4, apart, "auto"))
    # Block lists from files, for all heads, key heads and query heads.
    for n, (strategy, ranks) in enumerate((("local", 1), ("ring", 3), ("gather", 5), ("lightseq", 4), ("ulysses", 3), ("usp", 7), ("tree", 2), ("auto", 8))):
        listed = f"blocks:size=32x48,rows=rows{(1, 2, 6)[n % 3]}.npy,columns=columns{(1, 2, 6)[n % 3]}.npy"
        cases.append(Case(strategy, ranks, listed if n % 2 else "causal+" + listed))
    # Lengths that nothing divides, one token, fewer tokens than ranks, any mask.
    lengths = ((1, 5), (2, 3), (6, 7), (7, 8), (31, 7), (101, 4))
    for s, strategy in enumerate(STRATEGIES):
        for n, (tokens, ranks) in enumerate(lengths):
            mask = ("full", "causal", "window:3,1", "prefix:2")[(s + n) % 4]
            short = dataclasses.replace(BASE, queries=tokens, keys=tokens)
            cases.append(Case(strategy, ranks, mask, PARTITIONS[(s + n) % 4], short))
    cases.append(Case("local", 1, "causal", inputs=dataclasses.replace(BASE, queries=1, keys=1)))
    # Fewer queries than keys, and more: rows that no key stands before see nothing.
    decode = dataclasses.replace(BASE, queries=3)
    over = dataclasses.replace(BASE, queries=40, keys=23)
    for strategy, ranks, mask in (
        ("tree", 2, "full"),
        ("tree", 5, "causal"),
        ("tree", 8, "window:400,0"),
        ("ring", 4, "causal"),
        ("gather", 3, "window:64,0/sink:4"),
        ("ulysses", 7, "causal"),
        ("usp", 4, "prefix:606"),
        ("auto", 3, "causal"),
    ):
        cases.append(Case(strategy, ranks, mask, inputs=decode))
    for strategy, ranks in (("ring", 5), ("gather", 2), ("ulysses", 3), ("usp", 4), ("tree", 7)):
        cases.append(Case(strategy, ranks, "causal", inputs=over))
    cases.append(Case("local", 1, "documents:3,20", inputs=over))
    # Batches of sequences that share prefixes, every strategy and every number of ranks.
    for n, mask in enumerate(BATCHES):
        queries, keys = oracle.batch_lengths(mask.partition("@")[0])
        batch = dataclasses.replace(BASE, queries=queries, keys=keys)
        cases.append(Case("local", 1, mask, inputs=batch))
        for s, strategy in enumerate(STRATEGIES):
            ranks = RANKS[(n + s) % len(RANKS)]
            dtype = "bf16" if (n + s) % 4 == 0 else "auto"
            cases.append(Case(strategy, ranks, mask, PARTITIONS[(n + s) % 4], batch, dtype=dtype))
    # Key and value heads that differ.
    uneven = dataclasses.replace(BASE, queries=211, keys=211, key_heads=2, value_heads=3)
    for s, strategy in enumerate(STRATEGIES):
        cases.append(Case(strategy, RANKS[-1 - s % len(RANKS)], "causal", inputs=uneven))
    # Element types.
    half = dataclasses.replace(BASE, stored="f2")
    wide = dataclasses.replace(BASE, queries=211, keys=211, stored="f8")
    narrow = dataclasses.replace(wide, stored="f4")
    for s, strategy in enumerate(STRATEGIES):
        cases.append(Case(strategy, RANKS[s % len(RANKS)], "causal", "zigzag", wide))
    cases += [
        Case("ring", 3, "causal", inputs=half),
        Case("tree", 2, "full", inputs=half),
        Case("ulysses", 4, "causal", inputs=narrow, dtype="f8"),
        Case("gather", 5, "window:20,20", inputs=narrow, dtype="f8"),
        Case("ring", 2, "causal", inputs=wide, dtype="f4"),
        Case("local", 1, "prefix:9", inputs=wide),
    ]
    for s, strategy in enumerate(STRATEGIES):
        mask = ("causal", "window:100,7", "full", "prefix:50", "sink:4")[s % 5]
        ranks = RANKS[-1 - s % len(RANKS)]
        cases.append(Case(strategy, ranks, mask, inputs=narrow, dtype="bf16"))
    cases.append(Case("ring", 3, "causal", inputs=wide, dtype="bf16"))
    cases.append(Case("local", 1, "causal", inputs=half, dtype="bf16"))
    # Sums that travel in bfloat16.
    for s, strategy in enumerate(STRATEGIES):
        for dtype, ranks in (("auto", RANKS[s % len(RANKS)]), ("bf16", 8)):
            mask = ("causal", "full", "window:100,7")[s % 3]
            cases.append(Case(strategy, ranks, mask, inputs=narrow, dtype=dtype, wire="bf16"))
    cases.append(Case("ring", 8, "causal", inputs=narrow, wire="bf16", twice=True))
    # The scale.
    for strategy, ranks, scale in (
        ("ring", 3, 0.03125),
        ("ulysses", 2, -0.2),
        ("gather", 4, 0.0),
        ("tree", 5, 1e-3),
        ("local", 1, 0.25),
    ):
        cases.append(Case(strategy, ranks, "causal", scale=scale))
    # What else scores are made of, one by one and all of it.
    rules = {"soft_cap": 1.5, "alibi": "0.5,0.25,0.125,0.01,0,-0.02", "sinks": "0.5,-1,2,0,4,-3"}
    for s, strategy in enumerate(STRATEGIES):
        dtype = ("auto", "bf16", "f8")[s % 3]
        cases.append(Case(strategy, RANKS[(s + 3) % len(RANKS)], ("causal", "window:30,7")[s % 2], dtype=dtype, **rules))
    for n, (name, value) in enumerate(rules.items()):
        cases.append(Case(("gather", "lightseq", "ring")[n], 4, "causal", **{name: value}))
    told = {"bias": 9, "weights": True, "sigmoid": "auto"}
    for s, strategy in enumerate(STRATEGIES):
        dtype = ("bf16", "f8", "auto")[s % 3]
        ranks = RANKS[(s + 5) % len(RANKS)]
        cases.append(Case(strategy, ranks, ("prefix:50", "causal")[s % 2], dtype=dtype, soft_cap=1.5, **told))
        softmax = {**told, "sigmoid": ""}
        cases.append(Case(strategy, RANKS[s % len(RANKS)], "causal", PARTITIONS[s % 4], alibi="auto", sinks="0.25", **softmax))
    for n, (name, value) in enumerate(told.items()):
        cases.append(Case(("gather", "lightseq", "ring")[n], 4, "causal", **{name: value}))
    cases.append(Case("ulysses", 5, "window:3,0", weights=True, inputs=dataclasses.replace(uneven, queries=90)))
    cases.append(Case("local", 1, "causal", sigmoid="-1.5", inputs=over))
    cases.append(Case("ring", 3, "full", wire="bf16", sigmoid="0", inputs=narrow))
    for strategy, ranks in (("local", 1), ("gather", 3)):  # most rows see nothing but the sink
        cases.append(Case(strategy, ranks, "window:20,0+sink:7", alibi="auto", sinks="0.25"))
    # Meshes; heads are six, so 1x6 has no ring and 6x1 no exchange, or the other way about.
    for mesh in ("2x3", "3x2", "1x6", "6x1"):
        cases.append(Case("usp", 6, "causal", "zigzag", mesh=mesh))
    for strategy in ("usp_inner_ring", "double_ring"):
        for mesh in ("2x3", "3x2"):
            cases.append(Case(strategy, 6, "causal", "zigzag", mesh=mesh))
    # Longer: several tiles a rank.
    longer = dataclasses.replace(BASE, queries=1009, keys=1009)
    for s, strategy in enumerate(STRATEGIES):
        mask = ("causal", "window:100,7", "full", "documents:300,9,700+causal")[s % 4]
        cases.append(Case(strategy, RANKS[s % 3], mask, PARTITIONS[s // 2 % 4], longer))
    # Help, at even and odd numbers of ranks, and where the work lies in one rank's document.
    for ranks in (2, 3, 7, 8):
        cases.append(Case("lightseq", ranks, "causal", "contiguous"))
        cases.append(Case("lightseq", ranks, "documents:9,61,498,39+causal", "contiguous"))
    # Stages ahead, more of them than there are too.
    for n, strategy in enumerate(("ring", "gather", "lightseq", "double_ring", "usp")):
        for stages, ranks in ((1, 6), (2, 4), (9, 6)):
            partition = PARTITIONS[(n + stages) % 4]
            mask = MASKS[(n + stages) % len(MASKS)]
            cases.append(Case(strategy, ranks, mask, partition, prefetch=stages))
    # Memory to the byte: enough to keep Q, K, V by head for the backward pass, or one too few.
    for n, short in enumerate((0, 1)):
        for dtype in ("f4", "bf16"):
            even = ("ulysses", 3 + n, "causal", "zigzag", narrow)
            cases.append(Case(*even, dtype=dtype, short=short))
        cases.append(Case("usp", 6, "window:100,7", "zigzag", mesh="2x3", short=short))
        cases.append(Case("usp_inner_ring", 4, "causal", "zigzag", wide, short=short))
    # The same bytes on every run.
    for ranks in (2, 5):
        for threads in (1, 2):
            for strategy in ("ring", "tree", "gather", "lightseq"):
                cases.append(
                    Case(strategy, ranks, "causal", "balanced", threads=threads, twice=True)
                )
    return cases


@functools.lru_cache(maxsize=None)
def pairs(*mask_and_extents):
    """How many pairs a mask allows; arguments are those of oracle.allowed()."""
    return int(oracle.allowed(*mask_and_extents).sum())


class Trouble(Exception):
    """What one case got wrong."""


def require(condition, complaint):
    if not condition:
        raise Trouble(complaint)


class Bench:
    """Runs cases in a scratch folder and judges them."""

    def __init__(self, start, scratch):
        self.start = start
        self.scratch = scratch
        self.lock = threading.Lock()

    @functools.lru_cache(maxsize=4)
    def arrays(self, inputs):
        return inputs.arrays()

    def files(self, inputs):
        """Paths of Q, K, V and dO, written at first use."""
        paths = [self.scratch / f"{inputs.name()}_{kind}.npy" for kind in ("q", "k", "v", "do")]
        with self.lock:
            if not paths[0].exists():
                for path, array in zip(paths, self.arrays(inputs)):
                    numpy.save(path, array)
        return paths

    def table(self, name, numbers):
        """Path of a file of these numbers, written at first use."""
        path = self.scratch / name
        with self.lock:
            if not path.exists():
                numpy.save(path, numbers)
        return str(path)

    @functools.lru_cache(maxsize=4)
    def expected_cached(self, inputs, mask, rules, rounds):
        q, k, v, d_o = (oracle.bfloat16(x) if rounds else x for x in self.arrays(inputs))
        table = oracle.allowed(mask, inputs.queries, inputs.keys, inputs.heads, inputs.key_heads)
        gradients = oracle.gradients(q, k, v, d_o, table, rules)
        return oracle.attention(q, k, v, table, rules), (*gradients, table)

    def expected(self, case):
        """(O, LSE), and what gradient_errors() wants."""
        with self.lock:
            return self.expected_cached(*case.expects())

    def problem_words(self, case):
        words = []
        for name, path in zip(("--q", "--k", "--v"), self.files(case.inputs)):
            words += [name, str(path)]
        words += ["--mask", case.mask, "--strategy", case.strategy]
        words += ["--partition", case.partition, "--dtype", case.dtype, "--wire", case.wire]
        # Times that nobody measured make the choice of `auto` the same in run and plan.
        words += ["--machine", "latency=1e-5,bandwidth=1e9,rate=1e10,overhead=1e-6"]
        words += ["--mesh", case.mesh] if case.mesh else []
        words += ["--scale", repr(case.scale)] if case.scale is not None else []
        words += ["--soft-cap", repr(case.soft_cap)] if case.soft_cap else []
        words += [f"--alibi={case.alibi}"] if case.alibi else []
        words += [f"--sinks={case.sinks}"] if case.sinks else []
        words += [f"--sigmoid={case.sigmoid}"] if case.sigmoid else []
        i = case.inputs
        if case.bias:
            words += ["--relative-bias", self.table(f"bias_{i.heads}_{case.bias}.npy", oracle.relative_bias(i.heads, case.bias))]
        if case.weights:
            words += ["--key-weights", self.table(f"weights_{i.keys}_{i.key_heads}.npy", oracle.key_weights(i.keys, i.key_heads))]
        words += ["--prefetch", str(case.prefetch)] if case.prefetch else []
        words += [] if case.relay is None else ["--relay", "on" if case.relay else "off"]
        return words

    def plan(self, words, case):
        """What `dattn plan` says of the problem that the words describe."""
        words = ["plan", *words, "--ranks", str(case.ranks), "--json", "-"]
        words += ["--backward"] if case.gradients else []
        done = self.start.run(words)
        require(done.returncode == 0, f"plan: exit code {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def words(self, case):
        words = self.problem_words(case)
        if case.short is None:
            return words
        plan = self.plan([*words, "--memory", "1T"], case)["both_passes"]
        require(plan["keeps"], "nothing is kept where memory is no limit")
        return [*words, "--memory", str(plan["needed_bytes_to_keep"] - case.short)]

    def run(self, case):
        """Runs once, in a folder of its own, and judges. Returns the errors and the output bytes."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            return self.run_in(case, pathlib.Path(folder))

    def run_in(self, case, folder):
        words = ["run", *self.words(case), "--threads", str(case.threads), *case.run_words()]
        # Where memory is short by a byte the reference would not fit either; NumPy judges all.
        checks = case.short is None
        words += ["--check"] if checks else []
        outputs = {"--out": "o.npy", "--lse": "l.npy", "--json": "r.json", "--csv": "r.csv"}
        outputs["--trace"] = "t.json"
        if case.gradients:
            words += ["--grad", str(self.files(case.inputs)[3])]
            outputs |= {"--dq": "dq.npy", "--dk": "dk.npy", "--dv": "dv.npy"}
        for option, name in outputs.items():
            words += [option, str(folder / name)]
        done = self.start.run(words, case.ranks if case.ranks > 1 else 0)
        require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr.strip()}")
        passed = done.stdout.count("...... PASSED")
        require(passed == (1 + case.gradients) * checks, "--check does not say PASSED:\n" + done.stdout)
        left = sorted(path.name for path in folder.iterdir())
        require(left == sorted(outputs.values()), f"files left behind: {left}")
        o = numpy.load(folder / "o.npy")
        lse = numpy.load(folder / "l.npy")
        i = case.inputs
        element = case.delivers()
        require(o.shape == (i.queries, i.heads, i.d_v), f"O has shape {o.shape}")
        require(lse.shape == (i.queries, i.heads), f"LSE has shape {lse.shape}")
        require(o.dtype == element and lse.dtype == element, f"dtypes {o.dtype}, {lse.dtype}")
        result, gradients = self.expected(case)
        found = oracle.errors(o, lse, *result, large_scores=case.scale is not None or case.alibi != "")
        bound = (BOUND[case.rounds_to()], BOUND[case.computes_in()])
        good = found[0] <= bound[0] and found[1] <= bound[1]
        require(good, "errors of O %.3g and LSE %.3g" % found + f", bounds {bound}")
        if case.gradients:
            self.judge_gradients(case, folder, gradients)
        self.judge_reports(case, folder)
        arrays = [name for name in outputs.values() if name.endswith(".npy")]
        return found, [(folder / name).read_bytes() for name in arrays]

    def judge_gradients(self, case, folder, want):
        found = [numpy.load(folder / name) for name in ("dq.npy", "dk.npy", "dv.npy")]
        for x, like, kind in zip(found, self.arrays(case.inputs), ("dQ", "dK", "dV")):
            require(x.shape == like.shape, f"{kind} has shape {x.shape}")
            require(x.dtype == case.delivers(), f"{kind} has dtype {x.dtype}")
        errors = oracle.gradient_errors(found, *want)
        bound = GRADIENT_BOUND[case.rounds_to()]
        require(max(errors) <= bound, "errors of dQ %.3g, dK %.3g, dV %.3g" % errors + f", bound {bound}")

    def judge_reports(self, case, folder):
        report = json.loads((folder / "r.json").read_text())
        require(report["ranks"] == case.ranks, f"report of {report['ranks']} ranks")
        checks = case.short is None
        require(not checks or report["check"]["passed"] is True, "the report says that the check failed")
        require(report["problem"]["wire"] == case.wire, f"wire {report['problem']['wire']}")
        require(report["problem"]["compensate"] == case.compensate, f"{report['problem']}")
        sent = report["bytes_sent"]
        require(len(sent) == case.ranks, f"bytes_sent has {len(sent)} entries")
        planned = report["planned_bytes_sent"]
        require(planned == sent, f"sent {sent}, planned {planned}")
        moved = report["moved"]
        require([sum(ways) for ways in zip(*moved.values())] == sent, f"{moved} of {sent} bytes")
        if case.one_host():
            require(sum(moved["abroad"]) == 0, f"{moved}: there is one host")
        if report["strategy"] == "ring" and case.compensate == "off" and case.one_host():
            # Rows that heads under sparse masks need lie in pieces, which are copied.
            sparse = re.search(r"\+window|s2|stream|neighbor|batch|blocks|dilated", case.mask)
            require(sum(moved["rest"]) == 0, f"{moved}: all goes by memory that both see")
            require(sparse or moved["viewed"] == sent, f"{moved}: keys and values are looked at in place")
        plan = self.plan(self.words(case), case)
        if case.prefetch:
            require(plan["prefetch"] == case.prefetch, f"{plan['prefetch']} stages ahead")
        chosen = ("strategy", "partition", "mesh", "prefetch")
        for field in (*chosen, "bytes_sent", "pairs_total", "messages", "memory_bytes"):
            of_run = report.get(f"planned_{field}", report[field])
            require(plan[field] == of_run, f"{field}: {plan[field]} != {of_run}")
        if case.gradients:
            back = report["backward"]
            require(not checks or back["check"]["passed"] is True, "the report says that the gradients failed")
            require(back["planned_bytes_sent"] == back["bytes_sent"], "backward sent otherwise")
            for field in ("bytes_sent", "pairs_total", "messages", "memory_bytes"):
                of_run = back.get(f"planned_{field}", back[field])
                require(plan["backward"][field] == of_run, f"backward {field} of plan and run")
            both = report["both_passes"]
            for field in ("keeps", "kept_bytes", "memory_bytes"):
                require(plan["both_passes"][field] == both[field], f"{field} of plan and run")
            if case.short is not None:
                require(both["keeps"] == (case.short == 0), f"memory short of {case.short}: {both}")
                require(both["needed_bytes"] <= both["needed_bytes_to_keep"] - case.short, f"{both}")
        i = case.inputs
        triples = pairs(case.mask, i.queries, i.keys, i.heads, i.key_heads)
        require(plan["pairs_total"] == triples, f"{plan['pairs_total']} pairs, not {triples}")
        trace = json.loads((folder / "t.json").read_text())
        pids = {event["pid"] for event in trace["traceEvents"]}
        require(pids == set(range(case.ranks)), f"the trace has the pids {sorted(pids)}")
        with open(folder / "r.csv", newline="") as file:
            rows = list(csv.reader(file))
        require(len(rows) == 2 and len(rows[0]) == len(rows[1]), f"the CSV is {rows}")
        named = dict(zip(*rows))
        require(named["check"] == ("passed" if checks else "unchecked"), f"the CSV says check {named['check']}")
        require(named["compensate"] == case.compensate, f"the CSV says {named['compensate']}")
        require(named["mask"] == case.mask, f"the CSV says mask {named['mask']}")
        checked = ("passed" if checks else "unchecked") if case.gradients else ""
        require(named["gradient_check"] == checked, f"the CSV says {named['gradient_check']}")

    def judge(self, case):
        """None, or what is wrong with this case."""
        try:
            first = self.run(case)
            if case.twice:
                require(self.run(case)[1] == first[1], "a second run gave other bytes")
        except Trouble as trouble:
            return str(trouble)
        except (OSError, ValueError, KeyError) as error:  # unreadable outputs
            return f"{type(error).__name__}: {error}"
        return None

    def error_does_not_grow(self, strategy):
        """None, or what is wrong with the error at P = 8 beside the error at P = 1."""
        try:
            one = self.run(Case(strategy, 1, "causal", gradients=False))[0][0]
            eight = self.run(Case(strategy, 8, "causal", gradients=False))[0][0]
            require(eight <= 1.5 * one, f"error of O {eight:.3g} at P = 8, {one:.3g} at P = 1")
        except Trouble as trouble:
            return str(trouble)
        return None


def write_blocks(folder):
    """Lists of 607 tokens in blocks of 32 x 48, for 1, 2 and 6 heads."""
    for heads in (1, 2, 6):
        m = numpy.random.default_rng(heads).random((heads, 19, 13)) < 0.3
        rows = numpy.pad(m.sum(-1).cumsum(-1), ((0, 0), (1, 0)))
        numpy.save(folder / f"rows{heads}.npy", rows.astype("<i4") if heads == 2 else rows[0] if heads == 1 else rows)
        numpy.save(folder / f"columns{heads}.npy", m.nonzero()[2])


def small(start, scratch, only):
    write_blocks(scratch)
    os.chdir(scratch)  # masks name their files from here
    bench = Bench(start, scratch)
    cases = small_cases()
    # Those of one result side by side: NumPy then computes it once.
    order = {case.expects(): -n for n, case in reversed(list(enumerate(cases)))}
    cases.sort(key=lambda case: -order[case.expects()])
    work = [(case.text(), functools.partial(bench.judge, case)) for case in cases]
    for strategy in STRATEGIES:
        text = f"{strategy}: the error at P = 8 is about that at P = 1"
        work.append((text, functools.partial(bench.error_does_not_grow, strategy)))
    return judge_all(work, only)


def judge_all(work, only):
    """Runs what has `only` in its text, of pairs (text, judge); prints, and returns the number of failures."""
    work = [(text, judge) for text, judge in work if only in text]
    failures = 0
    # Two at a time, because much of a start is waiting.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        for (text, _), complaint in zip(work, pool.map(lambda item: item[1](), work)):
            failures += complaint is not None
            print("ok   " if complaint is None else "FAIL ", text, flush=True)
            if complaint is not None:
                print("     ", complaint, flush=True)
    print(f"{len(work)} cases, {failures} failures")
    return failures


def large(start, scratch, only):
    """8192 causal tokens, 32 heads over 8; NumPy computes a sample of rows, all heads."""
    inputs = Inputs(8192, 8192, 32, 8, 8, 128, 128)
    q, k, v, _ = inputs.arrays()
    paths = [scratch / f"{kind}.npy" for kind in "qkv"]
    for path, array in zip(paths, (q, k, v)):
        numpy.save(path, array)
    rows = numpy.unique([0, 1, 2047, 2048, 8190, 8191, *range(37, 8192, 173)])
    keys = numpy.arange(inputs.keys)
    mask = numpy.broadcast_to(keys[None, None, :] <= rows[None, :, None], (32, len(rows), 8192))
    want = oracle.attention(q[rows], k, v, mask, oracle.Rules(1 / math.sqrt(inputs.d_qk)))
    del q, k, v
    failures = 0
    found = {}
    for ranks in (1, 4):
        words = ["run", "--mask", "causal", "--strategy", "ring", "--partition", "zigzag"]
        words += ["--threads", "1", "--out", str(scratch / "o.npy"), "--lse", str(scratch / "l.npy")]
        for name, path in zip(("--q", "--k", "--v"), paths):
            words += [name, str(path)]
        done = start.run(words, ranks if ranks > 1 else 0, timeout=200)
        if done.returncode != 0:
            print(f"FAIL  P={ranks}: exit code {done.returncode}: {done.stderr.strip()}")
            failures += 1
            continue
        o = numpy.load(scratch / "o.npy", mmap_mode="r")[rows]
        lse = numpy.load(scratch / "l.npy", mmap_mode="r")[rows]
        found[ranks] = oracle.errors(o, lse, *want)
        good = max(found[ranks]) <= BOUND["f4"]
        failures += not good
        print("ok   " if good else "FAIL ", f"P={ranks}: errors of O %.3g, LSE %.3g" % found[ranks])
        for line in done.stdout.splitlines():
            if line.startswith(("plan:", "time:", "rate:")):
                print("      " + line)
    if len(found) == 2 and found[4][0] > 1.5 * found[1][0]:
        print("FAIL  the error at P = 4 is more than 1.5 times that at P = 1")
        failures += 1
    return failures


def main(arguments):
    only = ""
    if arguments[:1] == ["--only"]:
        only, arguments = arguments[1], arguments[2:]
    if len(arguments) < 3 or arguments[0] not in ("small", "large"):
        sys.exit(__doc__)
    start = jobs.Starter(arguments[1], arguments[2:])
    with tempfile.TemporaryDirectory() as scratch:
        suite = {"small": small, "large": large}[arguments[0]]
        sys.exit(1 if suite(start, pathlib.Path(scratch), only) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
