"""Decodes layers of latent attention whose weights and hidden states are in files, and has NumPy recompute y and LSE.

    weights.py [--only TEXT] DATTN MPIRUN...

A layer that dattn convert wrote gives the y of convert's own files and, where the conversion is exact, that of the GQA
layer; layers of other makers have compressed queries, YaRN and copies of RoPE. Files that do not fit, or differ between
ranks, are refused.
"""

import functools
import json
import pathlib
import shutil
import sys
import tempfile

import numpy

import convert
import end_to_end
import jobs
import oracle
from end_to_end import Trouble, require

BOUND = {"f4": 1e-5, "bf16": 8e-3}
STEPS, WARMUP = 2, 1
SIZES = {
    "version": 1, "model": 24, "heads": 5, "q_rank": 20, "kv_rank": 16, "d_nope": 8, "d_rope": 8, "d_v": 6, "epsilon": 1e-6,
    "rope_base": 1000.0, "rope_copies": 1, "rope_factor": 8.0, "rope_original": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip
COPIES = {key: SIZES[key] for key in list(SIZES)[:11]} | {"q_rank": 0, "rope_copies": 2}
# of a layer, its element type, form, ranks, dtype, new tokens, context, further words
OWN = [
    (SIZES, "f4", "sequence", 2, "f4", 1, (37, 0, 20), ()),
    (SIZES, "f8", "heads", 3, "f4", 3, (21,), ()),
    (SIZES, "f4", "latent-exact", 4, "f4", 1, (30, 5), ("--basis", "pca", "--calibration", "9")),
    (COPIES, "f2", "helix", 7, "bf16", 2, (33, 8), ()),
    (COPIES, "f4", "tree", 1, "f4", 1, (12,), ()),
    (SIZES, "f4", "sequence", 3, "f4", 1, (37, 5), ("--weights-dtype", "bf16", "--values", "before")),
    (SIZES, "f4", "sequence", 4, "f4", 2, (4, 0, 9, 1), ("--prefix-tree", "levels=1x11:2x13x8,sizes=4:3x1")),
    (SIZES, "f8", "heads", 2, "bf16", 12, (30, 9), ("--weights-dtype", "bf16")),  # 24 rows
    (COPIES, "f4", "latent-exact", 4, "f4", 4, (30,), ("--weights-dtype", "bf16", "--basis", "hadamard")),
]


def save_layer(folder, prefix, sizes, element):
    random = numpy.random.default_rng(5)
    for name, shape in convert.latent_shapes(sizes).items():
        array = random.normal(size=shape)
        inputs = shape[0] if name.startswith("down") or name == "up_q" else shape[-1]
        array = 1 + 0.1 * array if name.endswith("gamma") else array / numpy.sqrt(inputs)
        numpy.save(folder / f"{prefix}.{name}.npy", array.astype(element))
    (folder / f"{prefix}.json").write_text(json.dumps(sizes))


def save_x(folder, tokens, hidden):
    x = numpy.random.default_rng(6).normal(size=(tokens, hidden)).astype("<f4")
    numpy.save(folder / "x.npy", x)
    return x.astype(numpy.float64)


def words(form, dtype, new, context, more=()):
    line = f"decode --weights mla --x x.npy --form {form} --dtype {dtype} --new {new} --context {','.join(map(str, context))}"
    return [*f"{line} --steps {STEPS} --warmup {WARMUP} --threads 1".split(), *more]


def decoded(start, folder, ranks, *arguments):
    """y of the last step."""
    done = start.run([*words(*arguments), *"--check --out y.npy --json r.json".split()], ranks, cwd=folder)
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    require(json.loads((folder / "r.json").read_text())["model"] == "mla", "the report names another layer")
    return numpy.load(folder / "y.npy")


def suffixes(new, context):
    return [tokens + new * (STEPS + WARMUP) for tokens in context]


def rows_of(new, context, more):
    """The rows of x that each sequence consists of."""
    tree = more[more.index("--prefix-tree") + 1] + "," if "--prefix-tree" in more else ""
    suffix = ":".join(map(str, suffixes(new, context)))
    mask = f"batch:sequences={len(context)},new=1,{tree}suffix={suffix}"
    queries, keys = oracle.batch_lengths(mask)  # one query a sequence, which sees all that it has
    return [numpy.flatnonzero(row) for row in oracle.allowed(mask, queries, keys, 1)[0]]


def of_last_step(layer, x, new, context, more=()):
    """What `layer` makes of the last `new` tokens of each sequence, from all rows of the sequence."""
    return numpy.concatenate([layer(x[rows])[-new:] for rows in rows_of(new, context, more)])


def judge_y(y, layer, x, new, context, bound, more=()):
    want = of_last_step(layer, x, new, context, more)
    require(y.shape == want.shape, f"y is {y.shape}, not {want.shape}")
    error = numpy.linalg.norm(y - want) / numpy.linalg.norm(want)
    require(error <= bound, f"y is {error:.3g} off")


def own(start, folder, case):
    sizes, element, form, ranks, dtype, new, context, more = case
    save_layer(folder, "mla", sizes, element)
    x = save_x(folder, 1 + max(rows[-1] for rows in rows_of(new, context, more)), sizes["model"])
    y = decoded(start, folder, ranks, form, dtype, new, context, (*more, "--lse", "lse.npy"))
    narrow = "--weights-dtype" in more
    rounds = (lambda name, array: array if "gamma" in name else oracle.bfloat16(array)) if narrow else (lambda _, array: array)
    bound = BOUND["bf16" if narrow and form == "latent-exact" else dtype]
    judge_y(y, lambda rows: convert.latent_layer(folder, "mla", rows, rounds)[0], x, new, context, bound, more)
    want = of_last_step(lambda rows: convert.latent_lse(folder, "mla", rows, rounds), x, new, context, more)
    lse = numpy.load(folder / "lse.npy")
    require(lse.shape == want.shape, f"LSE is {lse.shape}, not {want.shape}")
    error = numpy.linalg.norm(lse - want) / numpy.linalg.norm(want)
    require(error <= bound, f"LSE is {error:.3g} off")


def converted(start, folder, exact):
    """GQA with 4:2 heads of 8, to MLA, decoded."""
    random = numpy.random.default_rng(8)
    shapes = {"q": (32, 40), "k": (16, 40), "v": (16, 40), "o": (40, 32)}
    w = {name: (random.normal(size=shape) / numpy.sqrt(shape[1])).astype("<f4") for name, shape in shapes.items()}
    for name, array in w.items():
        numpy.save(folder / f"{name}.npy", array)
    context = (60, 3)
    x = save_x(folder, sum(context) + len(context) * (STEPS + WARMUP), 40)
    line = "convert --q-proj q.npy --k-proj k.npy --v-proj v.npy --o-proj o.npy --heads 4 --kv-heads 2 --calibration x.npy"
    line += f" --held-out 9 --rope-base {convert.ROPE_BASE} --out mla" + (" --kv-rank 16 --rope-dim 16" if exact else " --kv-rank 12 --rope-dim 8")
    done = start.run(line.split(), 0, cwd=folder)
    require(done.returncode == 0, f"convert: exit code {done.returncode}: {done.stdout}{done.stderr}")
    for form, ranks in (("sequence", 3), ("latent-exact", 2), ("heads", 2)):
        y = decoded(start, folder, ranks, form, "f4", 1, context)
        judge_y(y, lambda rows: convert.latent_layer(folder, "mla", rows)[0], x, 1, context, 1e-5)
        if exact:
            gqa = {name: array.astype(numpy.float64) for name, array in w.items()}
            judge_y(y, lambda rows: convert.gqa_layer(gqa, rows, 4, 2, 8, True), x, 1, context, 1e-5)


def differ(start, folder, name):
    """Ranks in two folders, of whose files one number differs."""
    save_layer(folder, "mla", SIZES, "<f4")
    save_x(folder, 9 + STEPS + WARMUP, SIZES["model"])
    with tempfile.TemporaryDirectory() as other:
        shutil.copytree(folder, other, dirs_exist_ok=True)
        array = numpy.load(folder / f"{name}.npy")
        array.flat[-1] += 1
        numpy.save(f"{other}/{name}.npy", array)
        line = [*start.mpirun]
        for where in (folder, other):
            line += ["-np", "1", "-wdir", str(where), start.dattn, *words("sequence", "f4", 1, (9,)), ":"]
        done = start.run_line(line[:-1])
    option = "--x" if name == "x" else "--weights"
    require(done.returncode == 2, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    require(f"numbers in {option}" in done.stderr and "rank 1" in done.stderr, done.stderr)


def refuse(start, folder, change, more, code, says):
    """Without mpirun: what a changed file or a further word is told."""
    save_layer(folder, "mla", SIZES, "<f4")
    save_x(folder, 9 + STEPS + WARMUP, SIZES["model"])
    change(folder)
    done = start.run(words("sequence", "f4", 1, (9,), more.split()), 0, cwd=folder)
    require(done.returncode == code, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    require(says in done.stderr and done.stderr.count("\n") == 1, done.stderr)


def sizes(**changes):
    def change(folder):
        merged = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
        (folder / "mla.json").write_text(json.dumps(merged))
    return change


def array(name, shape):
    return lambda folder: numpy.save(folder / f"{name}.npy", numpy.zeros(shape, "<f4"))


REFUSALS = [
    (lambda folder: (folder / "mla.json").unlink(), "", 3, "mla.json"),
    (lambda folder: (folder / "mla.json").write_text("{"), "", 3, "is not JSON"),
    (lambda folder: (folder / "mla.up_v.npy").unlink(), "", 3, "mla.up_v.npy"),
    (sizes(heads=None), "", 3, "lacks 'heads'"),
    (sizes(heads="5"), "", 3, "no whole number as 'heads'"),
    (sizes(head=5), "", 3, "has 'head', which is none of version, model, heads"),
    (sizes(version=2), "", 3, "version 2"),
    (sizes(d_rope=7), "", 3, "d_rope is 7; it must be even"),
    (sizes(scale=0.5), "", 3, "the scale 0.5"),
    (sizes(q_rank=21), "", 3, "mla.down_q.npy' is [24, 20]; by 'mla.json' it must be [24, 21]"),
    (array("mla.out", (5, 6, 25)), "", 3, "it must be [5, 6, 24]"),
    (array("x", (12, 23)), "", 3, "--x: 'x.npy' has 23 numbers a token where the layer has 24"),
    (array("x", (13, 24)), "", 3, "--x: 'x.npy' has 13 tokens"),
    (array("x", (14, 24)), "--prefix-tree levels=1x3", 3, "has 14 tokens, where those of --prefix-tree, the sequence of --context and"),
    (array("x", (13,)), "", 3, "--x: 'x.npy' has 1 dimensions"),
    (sizes(), "--heads 5", 2, "--heads: the files of --weights say it"),
    (sizes(), "--weights-dtype f8", 2, "--weights-dtype"),
    (sizes(), "--spectrum 1", 2, "--spectrum: the files of --weights say it"),
    (sizes(), "--out mla.out.npy", 2, "input"),
]


def main(arguments):
    only, start = jobs.asked(arguments, __doc__)
    work = [(f"own {case[2]} P={case[3]} {case[1]} {case[4]} {case[7]}", own, case) for case in OWN]
    work += [(f"converted exact={exact}", converted, exact) for exact in (True, False)]
    work += [(f"differ in {name}", differ, name) for name in ("x", "mla.up_k")]
    work += [(f"refused: {row[3]}", lambda s, f, row: refuse(s, f, *row), row) for row in REFUSALS]

    def judge(function, case):
        try:
            with tempfile.TemporaryDirectory() as folder:
                function(start, pathlib.Path(folder), case)
        except Trouble as trouble:
            return str(trouble)
        return None

    table = [(name, functools.partial(judge, function, case)) for name, function, case in work]
    sys.exit(1 if end_to_end.judge_all(table, only) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
