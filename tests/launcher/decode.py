"""Runs dattn decode on files and lets NumPy judge what comes out.

    decode.py [--only TEXT] DATTN MPIRUN...

GQA: O and LSE of the last step against attention in NumPy, of sequences that share prefixes too. Latent
attention: y against the layer in double (--check), whose own judge is tests/kernels/latent_oracle.py, and the
same y and LSE from all exact forms. Both: bytes, messages and the cache against formulas. --only runs the cases whose line holds TEXT.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile
import threading

import numpy

import end_to_end
import jobs
import oracle
from end_to_end import BOUND, Trouble, require

RANKS = (1, 2, 3, 4, 5, 7, 8)
NEW = (1, 2, 5, 16)
LSE_BOUND = 2e-6  # absolute
BIAS_REACH = 7
FORMS = ("heads", "sequence", "helix", "tree")
STEPS, WARMUP = 2, 1


@dataclasses.dataclass(frozen=True)
class Case:
    form: str
    ranks: int
    dtype: str = "f4"
    new: int = 1
    context: tuple = (37, 0, 64)
    mesh: tuple = ()
    heads: int = 6
    key_heads: int = 2
    value_heads: int = 2
    d_qk: int = 16
    d_v: int = 12
    latent: tuple = ()  # hidden, q-rank, kv-rank, nope-dim, rope-dim, v-dim
    slices: int = 0
    tree: str = ""  # of prefixes
    more: tuple = ()  # further words
    twice: bool = False

    def text(self):
        mesh = f" {self.mesh[0]}x{self.mesh[1]}" if self.mesh else ""
        slices = f" {self.slices} slices" if self.slices else ""
        heads = f"{self.heads} heads" + ("" if self.latent else f" over {self.key_heads}/{self.value_heads}")
        words = " ".join(("", *((f"tree {self.tree}",) if self.tree else ()), *self.more))
        return f"{self.form}{mesh}{slices} P={self.ranks} {self.dtype} {heads} new={self.new} context={self.context}{words}"

    def rules(self):
        of = lambda name: self.more[self.more.index(name) + 1] if name in self.more else ""
        sinks = tuple(map(float, of("--sinks").split(","))) if of("--sinks") else ()
        alibi = tuple(oracle.published_slopes(self.heads)) if of("--alibi") == "auto" else ()
        bias = (self.heads, BIAS_REACH) if of("--relative-bias") else ()
        scale = float(of("--scale") or 1 / math.sqrt(self.d_qk))
        return oracle.Rules(scale, float(of("--soft-cap") or 0), alibi, sinks, bias)

    def verifies(self):
        """Whether it runs with --verify-wire, which changes no figure: some of every form."""
        return self.ranks in (3, 4) or "--hosts" in self.more

    def capacity(self):
        return [tokens + self.new * (STEPS + WARMUP) for tokens in self.context]

    def mask(self):
        """The last step as a mask of all tokens."""
        suffix = ":".join(map(str, self.capacity()))
        return f"batch:sequences={len(self.context)},new={self.new},{self.tree + ',' if self.tree else ''}suffix={suffix}"

    def shared(self):
        return oracle.batch_lengths(self.mask())[1] - sum(self.capacity())

    def tokens(self):
        return self.shared() + sum(self.capacity())

    def rows(self):
        return self.new * len(self.context)

    def element(self):
        return 2 if self.dtype == "bf16" else 4


SMALL = (24, 20, 16, 8, 4, 8)
WIDE = (32, 0, 512, 8, 64, 8)  # the latents of DeepSeek's models: 1152 bytes a token in bf16


def cases():
    table = []
    for f, form in enumerate(FORMS):
        for p, ranks in enumerate(RANKS):
            for n, dtype in enumerate(("f4", "bf16")):
                turn = f + p + n
                table.append(
                    Case(
                        form,
                        ranks,
                        dtype,
                        new=NEW[turn % 4],
                        context=((37, 0, 64), (101,), (8, 9), (0, 0, 0, 513))[(turn + n) % 4],
                        key_heads=(2, 2, 6, 1)[turn % 4],
                        value_heads=(2, 1, 6, 1)[turn % 4],
                        twice=turn % 5 == 0,
                    )
                )
    for form in ("helix", "tree"):
        for mesh in ((2, 2), (3, 2), (2, 3), (4, 1), (1, 4)):
            table.append(Case(form, mesh[0] * mesh[1], new=3, mesh=mesh))
    table.append(Case("heads", 7, heads=4, key_heads=4, value_heads=4))  # ranks without heads
    table.append(Case("sequence", 8, heads=3, key_heads=1, value_heads=1))
    table.append(Case("sequence", 8, context=(0,)))  # ranks without tokens
    table.append(Case("sequence", 1, heads=1, key_heads=1, value_heads=1, d_v=1))  # extents of 1 are in the shape, too
    some = (9, 0, 17, 3, 4, 5)  # what sequences have of their own
    for form, ranks, new, tree, context in (
        ("sequence", 1, 1, "levels=1x50", some),
        ("heads", 2, 2, "levels=1x21:2x30:6x3", some),
        ("sequence", 3, 1, "levels=1x3:2x40x5,sizes=6:1x5", some),
        ("helix", 4, 16, "levels=2x33", some),
        ("tree", 5, 1, "levels=1x50:3x20", (0,) * 6),
        ("sequence", 8, 5, "levels=1x5", some),
    ):
        table.append(Case(form, ranks, ("f4", "bf16")[ranks % 2], new, context, tree=tree, twice=ranks == 3))
    table.append(Case("tree", 7, context=(2,) * 40, tree="levels=1x700:4x90", heads=8))  # keys that many read

    def latent(form, ranks, dtype, **more):
        table.append(Case("latent-" + form, ranks, dtype, **{"latent": SMALL, "heads": 4, "context": (37, 0, 50), **more}))

    for f, form in enumerate(FORMS):
        for p, ranks in enumerate(RANKS):
            latent(form, ranks, ("f4", "bf16")[(f + p) % 2], new=NEW[p % 4])
    for form, ranks, new, tree in (
        ("sequence", 1, 1, "levels=1x50"),
        ("heads", 2, 2, "levels=1x21:2x30:6x3"),
        ("sequence", 3, 2, "levels=1x21:2x30:6x3"),
        ("helix", 4, 1, "levels=1x50"),
        ("tree", 5, 2, "levels=1x21:2x30:6x3"),
        ("heads", 7, 1, "levels=1x3:2x40x5,sizes=6:1x5"),  # ranks without heads
        ("sequence", 8, 1, "levels=1x3:2x40x5,sizes=6:1x5"),
    ):
        latent(form, ranks, "f4", new=new, context=some, tree=tree, twice=ranks == 3)
    latent("sequence", 4, "bf16", context=(2,) * 40, tree="levels=1x700:4x90", heads=8)
    for form, ranks, new, tree in (  # slices, too
        ("exact", 3, 2, "levels=1x21:2x30:6x3"),
        ("exact", 8, 1, "levels=1x3:2x40x5,sizes=6:1x5"),
        ("tpla", 1, 1, "levels=1x50"),
        ("tpla", 4, 2, "levels=1x21:2x30:6x3"),
        ("tpla", 5, 1, "levels=1x3:2x40x5,sizes=6:1x5"),
    ):
        latent(form, ranks, "f4", new=new, context=some, tree=tree, twice=ranks == 4)
    latent("exact", 2, "bf16", context=(2,) * 40, tree="levels=1x700:4x180", heads=8)  # more scores than one message takes
    for where, ranks, new in (("after", 2, 16), ("before", 3, 1), ("before", 5, 2)):  # of the merge of Partials
        latent("sequence", ranks, ("f4", "bf16")[ranks % 2], new=new, more=("--values", where))
    for ranks in RANKS:
        latent("exact", ranks, "f4", new={4: 16, 5: 2, 7: 5}.get(ranks, 1))
        latent("exact", ranks, "bf16")
    for ranks, slices in ((4, 2), (8, 4), (6, 3), (4, 1)):
        latent("exact", ranks, "f4", slices=slices, context=(1100, 7))
    for ranks, slices in ((2, 0), (4, 0), (3, 3), (8, 4), (1, 1), (5, 1)):
        latent("tpla", ranks, ("f4", "bf16")[ranks % 2], slices=slices, twice=ranks == 4, new={4: 16, 5: 5}.get(ranks, 1))
    for ranks in (1, 3, 5):  # as many slices as the ranks allow
        latent("tpla", ranks, "f4", new=2)
    latent("tpla", 2, "f4", slices=2, more=("--basis", "hadamard", "--norm", "slice", "--factor", "energy"))
    latent("tpla", 2, "f4", slices=2, more=("--basis", "pca", "--factor", "one", "--spectrum", "1"))
    for form, ranks in (("sequence", 4), ("helix", 8), ("tree", 2)):
        latent(form, ranks, "bf16", latent=WIDE, context=(40 - STEPS - WARMUP,))
    latent("tpla", 4, "bf16", latent=WIDE)
    table.append(Case("tree", 6, new=3, more=("--hosts", "2+1+3"), twice=True))
    for n, form in enumerate(FORMS):  # 6 heads
        more = ("--soft-cap", "0.7", "--sinks", "0.5,-1,2,0,4,-3")
        table.append(Case(form, (2, 3, 4, 5)[n], ("f4", "bf16")[n % 2], new=2, more=more))
    for n, form in enumerate(FORMS):  # scores by distance, which is counted in each sequence
        for more in (("--alibi", "auto", "--scale", "0.3"), ("--relative-bias", "BIAS", "--soft-cap", "0.7", "--sinks", "0.5,-1,2,0,4,-3")):
            dtype, tree = (("f4", "bf16"), ("bf16", "f4"))[n % 2][len(more) > 4], ("", "levels=1x21:2x30:6x3")[n // 2]
            table.append(Case(form, (5, 8, 3, 2)[n], dtype, 1 + 4 * (n % 2), some, tree=tree, more=more))
            more += ("--rank-speeds", "1,0.5,0.8")
            table.append(Case(form, 3, dtype, 2, some, tree="levels=1x50:3x20", more=more))
    table.append(Case("sequence", 1, context=(513,), key_heads=1, value_heads=1, more=("--alibi", "auto"), twice=True))
    latent("sequence", 4, "f4", more=("--hosts", "2x2"))
    latent("exact", 4, "f4", more=("--hosts", "2x2"))
    return table


def even_part(count, parts, part):
    return range(count * part // parts, count * (part + 1) // parts)


def mesh_of(case):
    """(rows of ranks that split the tokens, columns that split the heads), or None for slices."""
    form = case.form.removeprefix("latent-")
    if form in ("exact", "tpla"):
        return None
    if case.mesh:
        return case.mesh
    if form == "heads":
        return (1, case.ranks)
    if form in ("sequence", "tree"):
        return (case.ranks, 1)
    key_heads = 1 if case.latent else case.key_heads
    columns = max(c for c in range(1, case.ranks + 1) if case.ranks % c == 0 and key_heads % c == 0)
    return (case.ranks // columns, columns)


def slices_of(case):
    fewest = next((g for g in range(2, case.ranks + 1) if case.ranks % g == 0), 1)
    return case.slices or (case.ranks if case.form == "latent-exact" else fewest)


def values_of(case):
    """Where W_UV is applied: before Partials meet where that is fewer bytes, sent and read of W_UV."""
    if case.form != "latent-sequence":
        return "after"
    if "--values" in case.more:
        return case.more[case.more.index("--values") + 1]
    saved = (case.ranks - 1) * case.rows() * case.heads * (case.latent[2] - case.latent[5]) * 4
    return "before" if saved > (case.ranks - 1) * case.heads * case.latent[2] * case.latent[5] * 4 else "after"


def asking(case):
    """Of each stretch of the cache in the last step: rows that see it, and its tokens."""
    prefixes, suffixes = oracle.batch_parts(dict(part.split("=") for part in case.mask().partition(":")[2].split(",")))
    return [(case.new * int(behind - first), int(tokens)) for first, behind, tokens in prefixes + suffixes if behind > first]


def scores(case):
    """Scores of a head: of each row and token that it sees; of new ones too that it does not."""
    return sum(rows * tokens for rows, tokens in asking(case))


def score_messages(case, heads):
    """Messages of up to 2^18 scores; of 256 tokens at least, if a stretch has as many."""
    most, messages, filled = 2**18, 0, 2**18
    for rows, tokens in asking(case):
        while tokens > 0:
            least = min(tokens, 256)
            if filled + rows * heads * least > most or messages == 0:
                messages, filled = messages + 1, 0
            some = min(tokens, max(least, (most - filled) // (rows * heads)))
            tokens, filled = tokens - some, filled + rows * heads * some
    return messages


def traffic(case):
    """Bytes and messages of the last step, of all ranks."""
    rows, ranks = case.rows(), case.ranks
    sent, messages = 0, 0
    if case.latent and ranks > 1:
        hidden, q_rank, kv_rank, _, rope, _ = case.latent
        sent += 2 * (ranks - 1) * rows * hidden * 4  # the all-reduce of y
        messages += ranks
        columns = q_rank + kv_rank + rope  # of W_DQ and W_DKV, dealt in pieces of 32
        sent += (ranks - 1) * rows * columns * 4
        messages += (ranks - 1) * min(ranks, -(-columns // 32))
    form = case.form.removeprefix("latent-")
    if form in ("exact", "tpla"):
        slices = slices_of(case)
        for group in range(ranks // slices if slices > 1 else 0):
            heads = len(even_part(case.heads, ranks // slices, group))
            if heads > 0:  # queries of some heads from each, values of all heads added up
                _, _, _, nope, rope, value = case.latent
                sent += (slices - 1) * rows * heads * (nope + rope + 2 * value) * 4
                messages += (slices - 1) * min(heads, slices) + slices
            if form == "tpla":
                continue
            if heads > 0:
                sent += 2 * (slices - 1) * heads * scores(case) * 4
                messages += slices * score_messages(case, heads)
        return sent, messages
    d_qk, d_v = (case.latent[2] + case.latent[4], case.latent[2]) if case.latent else (case.d_qk, case.d_v)
    record = ((case.latent[5] if values_of(case) == "before" else d_v) + 2) * 4
    tokens, columns = mesh_of(case)
    for column in range(columns):
        heads = len(even_part(case.heads, columns, column))
        if form == "tree":
            sent += 2 * (tokens - 1) * rows * heads * record
            messages += tokens * (tokens > 1 and heads > 0)
        elif form != "heads":  # what the others make, and what they deliver
            sent += (tokens - 1) * rows * heads * (record + (d_qk * case.element() if form == "sequence" else 0))
            messages += (tokens - 1) * min(heads, tokens) * (2 if form == "sequence" else 1)
    return sent, messages


def between_hosts(case):
    """Bytes of the last step between the hosts of --hosts."""
    if "--hosts" not in case.more:
        return 0
    words = case.more[case.more.index("--hosts") + 1]
    hosts = int(words.split("x")[0]) if "x" in words else len(words.split("+"))
    once, apart = 0, 0  # what all ranks get of all; the rest
    if case.latent:
        once += 2 * case.rows() * case.latent[0] * 4
        # What ranks make of columns or of heads goes to each rank elsewhere.
        elsewhere = case.ranks - case.ranks // hosts
        _, q_rank, kv_rank, nope, rope, value = case.latent
        apart = elsewhere * case.rows() * (q_rank + kv_rank + rope) * 4
    if case.form == "latent-exact":
        apart += elsewhere * case.rows() * case.heads * (nope + rope) * 4
        once += 2 * case.rows() * case.heads * value * 4
        once += 2 * case.heads * scores(case) * 4
    if case.form == "tree":
        once += 2 * case.rows() * case.heads * (case.d_v + 2) * 4
    sent = (hosts - 1) * once + apart
    if case.form == "latent-sequence":  # queries to each host once, Partials from each rank
        row = case.latent[2] + case.latent[4]
        sent += (hosts - 1) * case.rows() * case.heads * row * case.element()
        sent += case.ranks * (hosts - 1) // hosts * case.rows() * case.heads * (case.latent[2] + 2) * 4
    return sent


def cached(case):
    """Bytes of the cache after the last step, of each rank."""
    if mesh_of(case) is None:
        width = lambda r: len(even_part(case.latent[2], slices_of(case), r % slices_of(case))) + case.latent[4]
        return [case.tokens() * width(r) * case.element() for r in range(case.ranks)]
    tokens, columns = mesh_of(case)
    bytes_ = []
    for rank in range(case.ranks):
        mine = even_part(case.heads, columns, rank % columns)
        # Tokens are dealt to ranks in turn; a row of ranks has those of all of its ranks.
        held = sum(p % case.ranks // columns == rank // columns for p in range(case.tokens()))
        if case.latent:
            numbers = (case.latent[2] + case.latent[4]) * (len(mine) > 0)
        else:
            touched = lambda count: len({h * count // case.heads for h in mine})
            numbers = touched(case.key_heads) * case.d_qk + touched(case.value_heads) * case.d_v
        bytes_.append(held * numbers * case.element())
    return bytes_


class Bench:
    """Runs cases in a scratch folder and judges them."""

    def __init__(self, start, scratch):
        self.start = start
        self.scratch = scratch
        self.lock = threading.Lock()
        self.count = 0
        self.has_digests = "with xxHash" in start.run(["--version"]).stdout
        self.y = {}  # y and LSE of exact latent forms: by what they were given

    def folder(self):
        with self.lock:
            self.count += 1
        folder = self.scratch / str(self.count)
        folder.mkdir()
        return folder

    def words(self, case, folder):
        words = ["decode", "--form", case.form, "--dtype", case.dtype, "--new", str(case.new)]
        words += ["--context", ",".join(map(str, case.context)), "--steps", str(STEPS), "--warmup", str(WARMUP)]
        words += ["--threads", "1", "--check", "--out", str(folder / "o.npy"), "--json", str(folder / "r.json")]
        words += ["--mesh", "x".join(map(str, case.mesh))] if case.mesh else []
        words += [str(self.bias(case)) if word == "BIAS" else word for word in case.more]
        words += ["--prefix-tree", case.tree] if case.tree else []
        words += ["--verify-wire"] if case.verifies() and self.has_digests else []
        words += ["--lse", str(folder / "l.npy")] if case.form != "latent-tpla" else []
        if not case.latent:
            for name in "qkv":
                words += [f"--{name}", str(folder / f"{name}.npy")]
            return words
        for name, size in zip(("hidden", "q-rank", "kv-rank", "nope-dim", "rope-dim", "v-dim"), case.latent):
            words += [f"--{name}", str(size)]
        words += ["--heads", str(case.heads)]
        words += ["--calibration", "64"] if mesh_of(case) is None else []
        return words + (["--slices", str(case.slices)] if case.slices else [])

    def bias(self, case):
        """The file of a bias by relative distance; beside the folder, which holds outputs only."""
        path = self.scratch / f"bias{case.heads}.npy"
        if not path.exists():
            numpy.save(path, oracle.relative_bias(case.heads, BIAS_REACH))
        return path

    def arrays(self, case):
        tokens = case.tokens()
        random = numpy.random.default_rng([tokens, case.ranks])
        shapes = ((case.heads, case.d_qk), (case.key_heads, case.d_qk), (case.value_heads, case.d_v))
        return [random.standard_normal((tokens, *s)).astype("<f4") for s in shapes]

    def run(self, case):
        """The arrays of --out and --lse and the report, of a run in a folder of its own."""
        folder = self.folder()
        if not case.latent:
            for name, array in zip("qkv", self.arrays(case)):
                numpy.save(folder / f"{name}.npy", array)
        done = self.start.run(self.words(case, folder), case.ranks)
        require(done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
        left = {path.name for path in folder.iterdir()} - {"q.npy", "k.npy", "v.npy"}
        has_lse = case.form != "latent-tpla"
        require(left == {"o.npy", "r.json", *(("l.npy",) if has_lse else ())}, f"files {left}")
        out = numpy.load(folder / "o.npy")
        lse = numpy.load(folder / "l.npy") if has_lse else None
        for array in (out, lse) if has_lse else (out,):
            require(array.dtype == numpy.dtype("<f4") and array.flags.c_contiguous, f"out is {array.dtype}")
        require(not has_lse or lse.shape == (case.rows(), case.heads), "LSE is of another shape")
        return out, lse, json.loads((folder / "r.json").read_text())

    def judge_heads(self, case, o, lse):
        rounds = oracle.bfloat16 if case.dtype == "bf16" else lambda x: x
        q, k, v = (rounds(x) for x in self.arrays(case))
        ends = case.shared() + numpy.cumsum(case.capacity())
        queries = numpy.concatenate([q[end - case.new : end] for end in ends])
        mask = oracle.allowed(case.mask(), case.rows(), case.tokens(), case.heads)
        # The tokens of a sequence lie in its order, prefixes first, its query last.
        apart = mask[0].cumsum(axis=1) - mask[0].sum(axis=1, keepdims=True)
        want, want_lse = oracle.attention(queries, k, v, mask, case.rules(), apart)
        require(o.shape == want.shape, f"O is {o.shape}, not {want.shape}")
        error, lse_error = oracle.errors(o, lse, want, want_lse)
        require(error <= BOUND[case.dtype], f"O is {error:.3g} off")
        require(lse_error <= LSE_BOUND, f"LSE is {lse_error:.3g} off")

    def judge_latent(self, case, y, lse, report):
        require(y.shape == (case.rows(), case.latent[0]), f"y is {y.shape}")
        require(numpy.isfinite(y).all() and y.any(), "y is not finite, or zero")
        if case.form == "latent-tpla" and slices_of(case) > 1:
            # An approximation: what it is off is said, and neither nothing nor everything.
            require(report["check"]["bound"] is None, "there is a bound on what is approximate")
            require(1e-6 < report["check"]["error"] < 1, f"TPLA is {report['check']['error']} off")
            return
        key = (case.dtype, case.new, case.context, case.heads, case.latent, case.tree)
        with self.lock:
            other, other_lse = self.y.setdefault(key, (y, lse))
        bound = 3e-2 if case.dtype == "bf16" else 2e-5
        error = numpy.linalg.norm(y - other) / numpy.linalg.norm(other)
        require(error <= bound, f"y is {error:.3g} off another form's")
        if lse is not None and other_lse is not None:
            require(abs(lse - other_lse).max() <= bound, "LSE is off another form's")

    def judge_report(self, case, report):
        sent, messages = traffic(case)
        require(report["bytes_step"] == sent, f"a step sends {report['bytes_step']} bytes, not {sent}")
        require(report["messages_step"] == messages, f"{report['messages_step']} messages, not {messages}")
        if case.verifies() and self.has_digests:
            verified = report["verified_step"]["messages"]
            require((verified > 0) == (messages > 0), f"{verified} messages of {messages} were verified")
        between = between_hosts(case)
        require(report["bytes_between_hosts_step"] == between, f"{report['bytes_between_hosts_step']} bytes between hosts, not {between}")
        ranks = cached(case)
        require(report["kv_bytes"] == sum(ranks), f"a cache of {report['kv_bytes']} bytes, not {sum(ranks)}")
        a_token = report["kv_bytes_token_rank"]
        if "--rank-speeds" not in case.more:  # rank_speeds.py judges these
            require(report["kv_bytes_rank"] == max(ranks), f"{report['kv_bytes_rank']} on a rank, not {max(ranks)}")
            require(math.isclose(a_token, max(ranks) / case.tokens()), f"{a_token} bytes a token")
        if case.latent == WIDE:
            want = 640 if case.form == "latent-tpla" else 1152 / case.ranks
            require(math.isclose(a_token, want), f"{a_token} bytes a token on a rank, not {want}")
        mesh = mesh_of(case) or (case.ranks // slices_of(case), slices_of(case))
        for key, value in {
            "version": 1,
            "command": "decode",
            "form": case.form,
            "ranks": case.ranks,
            "mesh": f"{mesh[0]}x{mesh[1]}",
            "threads": 1,
            "dtype": case.dtype,
            "batch": len(case.context),
            "new_tokens": case.new,
            "context": list(case.context),
            "steps": STEPS,
            "heads": case.heads,
            "prefix_tokens": case.shared(),
            "values": values_of(case) if case.latent else "none",
            "kv_heads": 1 if case.latent else case.key_heads,
        }.items():
            require(report[key] == value, f"{key} is {report[key]}, not {value}")
        for key in ("seconds_median", "seconds_p95", "tokens_per_second", "memory_bytes_rank"):
            require(report[key] > 0, f"{key} is {report[key]}")
        for key in ("project_seconds", "attention_seconds", "wait_seconds", "reduce_seconds"):
            require(report[key] >= 0, f"{key} is {report[key]}")
        require(report["check"]["passed"] is True, f"check: {report['check']}")

    def judge(self, case):
        """None, or what is wrong with this case."""
        try:
            out, lse, report = self.run(case)
            self.judge_report(case, report)
            if case.latent:
                self.judge_latent(case, out, lse, report)
            else:
                self.judge_heads(case, out, lse)
            if case.twice:
                again, again_lse, _ = self.run(case)
                require(again.tobytes() == out.tobytes(), "a second run gave other bits")
                require(lse is None or again_lse.tobytes() == lse.tobytes(), "a second run gave another LSE")
        except Trouble as trouble:
            return str(trouble)
        except (OSError, ValueError, KeyError) as error:  # unreadable outputs
            return f"{type(error).__name__}: {error}"
        return None

    def judge_openblas(self):
        """None, or what is wrong with the kernels that OpenBLAS takes for products with weights."""
        words = "decode --model deepseek-v2-lite --heads 2 --context 5 --steps 1 --threads 1 --json -".split()

        def core(**environment):
            done = self.start.run(words, environment=environment)
            require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr.strip()}")
            return json.loads(done.stdout)["blas"].lower()

        try:
            flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
            if not {"avx2", "fma"} <= flags:
                return None  # nothing is known better than OpenBLAS
            if core(OPENBLAS_CORETYPE="Haswell") != "haswell":
                return None  # it is built for one processor
            good = {"skylakex", "cooperlake", "sapphirerapids"}
            if not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
                good |= {"haswell", "zen"}
            require(core() in good, f"OpenBLAS takes its kernels for {core()}")
        except Trouble as trouble:
            return str(trouble)
        return None


def main(arguments):
    only, start = jobs.asked(arguments, __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(start, pathlib.Path(scratch))
        work = [(case.text(), functools.partial(bench.judge, case)) for case in cases()]
        work.append(("OpenBLAS takes the kernels of this processor", bench.judge_openblas))
        sys.exit(1 if end_to_end.judge_all(work, only) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
