"""Gives the dattn command what it must refuse, and looks at how it refuses.

    bad_input.py [--only TEXT] DATTN MPIRUN...

A refusal is: the documented exit code; one line on stderr that starts with "[rank r] " and names
the argument or file (mpirun's own notice may follow); nothing on stdout that looks like success;
no output file and no temporary; and no hang. --only runs the cases whose name holds TEXT.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy

import bad_decode_permute
import bad_scores
import jobs
from bad_decode_permute import FILES, INPUT, MEMORY, OUTPUT, USAGE

INTERRUPTED = 130
SUCCESS = ("time:", "rate:", "PASSED", "verdict: ok")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
WORKERS = 4  # cases at a time


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    words: str  # of one dattn, split at spaces; '' stands for an empty word
    code: int
    says: str  # regular expression that the complaint must contain; for code 0, stdout
    environment: dict = dataclasses.field(default_factory=dict)
    ranks: int = 0  # 0: without mpirun
    other: str = ""  # the words of the last rank, where they differ


def npy(descr="<f4", shape=(7, 2, 4), order="False", data=None, version=b"\x01\x00"):
    """The bytes of an .npy file that says so, true or not."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode() + (bytes(7 * 2 * 4 * 4) if data is None else data)


def write_fixtures(folder):
    """Good files q, k, v of 7 tokens, 2 heads of 4 numbers; and one file for each kind of wrong."""
    ones = lambda *shape: numpy.ones(shape, numpy.float32)
    files = {
        "q": ones(7, 2, 4),
        "k": ones(7, 2, 4),
        "v": ones(7, 2, 4),
        "do": ones(7, 2, 4),
        "other_q": 2 * ones(7, 2, 4),
        "longer_v": ones(8, 2, 4),
        "wide_k": ones(7, 2, 5),
        "three_heads": ones(7, 3, 4),
        "fortran": numpy.asfortranarray(numpy.arange(56, dtype="<f4").reshape(7, 2, 4)),
        "big_endian": ones(7, 2, 4).astype(">f4"),
        "ints": ones(7, 2, 4).astype(int),
        "complex": ones(7, 2, 4).astype(complex),
        "bools": ones(7, 2, 4).astype(bool),
        "longdouble": ones(7, 2, 4).astype(numpy.longdouble),
        "flat": ones(7, 8),
        "deep": ones(7, 2, 4, 1),
        "scalar": ones(),
        "no_tokens": ones(0, 2, 4),
        "no_heads": ones(7, 0, 4),
        "no_dim": ones(7, 2, 0),
        # Block lists of 31 tokens in blocks of 16: rows 2, columns 2.
        "rows": numpy.array([0, 1, 3]),
        "columns": numpy.array([0, 0, 1], numpy.int32),
        "rows_short": numpy.array([0, 1]),
        "rows_shifted": numpy.array([1, 2, 3]),
        "columns_short": numpy.array([0, 0]),
        "columns_back": numpy.array([0, 1, 0]),
        "columns_far": numpy.array([0, 0, 2]),
        # Documents of 31 tokens.
        "offsets": numpy.array([0, 9, 9, 31], numpy.int32),
        "offsets_back": numpy.array([0, 9, 8, 31]),
        # A GQA layer of 4 heads and 2 key heads of 6 numbers, hidden 10.
        "wq": ones(24, 10),
        "wk": ones(12, 10),
        "wv": ones(12, 10),
        "wo": ones(10, 24),
        "x": ones(9, 10),
        "x_nan": ones(9, 10) * numpy.nan,
        # What scores are made of, for 31 tokens of 8 heads.
        "bias": ones(8, 5),
        "bias_even": ones(8, 4),
        "bias_long": numpy.broadcast_to(ones(1), (1, 262147))[0],
        "bias_one": numpy.array([-numpy.inf, -numpy.inf, -numpy.inf, 0, -numpy.inf], "<f4"),
        "weights": numpy.full(31, -numpy.inf, "<f4"),
        "weights_inf": numpy.full(31, numpy.inf, "<f4"),
        "weights_ints": numpy.arange(31),
        "records": numpy.zeros(7, dtype=[("a", "<f4"), ("b", "<f4")]),
    }
    for name, array in files.items():
        numpy.save(folder / f"{name}.npy", array)
    numpy.save(folder / "objects.npy", numpy.array([[["a", None]]], object), allow_pickle=True)
    good = (folder / "q.npy").read_bytes()
    raw = {
        "empty": b"",
        "text": b"1 2 3\n4 5 6\n",
        "zip": b"PK\x03\x04" + bytes(100),
        "magic_only": b"\x93NUMPY",
        "half_header": good[:40],
        "truncated": good[:-1],
        "longer": good + b"\0",
        "version_0": npy(version=b"\x00\x00"),
        "version_4": npy(version=b"\x04\x00"),
        "no_newline": good.replace(b"\n", b" ", 1),
        "header_0": good[:8] + b"\0\0" + good[10:],
        "header_huge": good[:6] + b"\x02\x00\xff\xff\xff\xff" + good[12:],
        "twice": good.replace(b"'shape': (7, 2, 4), }", b"'descr': '<f4', }    ").replace(b"', }  ", b"', }  "),
        "negative": npy(shape="(-7, 2, 4)"),
        "locale": npy(shape="(2,621,401)"),
        "overflow": npy(shape=f"({2**62}, 2, 4)"),
        "beyond_64_bits": npy(shape=f"({2**64}, 2, 4)"),
        "line_break\nin_name": b"x",
    }
    for name, content in raw.items():
        (folder / f"{name}.npy").write_bytes(content)
    tables = {
        "list": "[1]",
        "unknown": '{"mosk": "full"}',
        "number": '{"mask": 3}',
        "table": '{"mask": "full@0-7"}',
        "twice": '{"mask": "full", "heads": {"1-3": "causal", "3": "full"}}',
        "missing": '{"heads": {"0-3,5-7": "causal"}}',
        "beyond": '{"mask": "full", "heads": {"8": "causal"}}',
        "back": '{"mask": "full", "heads": {"3-1": "causal"}}',
        "words": '{"mask": "casual"}',
        "heads": '{"mask": "full", "heads": ["causal"]}',
        "layers": '{"layers": {"1-3": {"mask": "full"}, "2": {"mask": "full"}}}',
        "good": '{"mask": "stream:sink=1,recent=3", "key_heads": {"0,2": "causal"}}',
        "layered": '{"layers": {"0,5": {"mask": "full"}, "1-4": {"heads": {"0-7": "causal"}}}}',
        "machine": '{"version": 1, "command": "machine", "name": "n", "hosts": "1", "ranks": 1, "threads": 1, "memory_bytes": 0, '
        '"inside": null, "between": null, "isa": "portable", "kernels": ['
        + ", ".join(f'{{"isa": "portable", "dtype": "{t}", "rate": 1e9, "backward_rate": 1e9, "rows": 0}}' for t in ("f4", "bf16", "f8"))
        + "]}",
        "empty": "",
        "text": "mask: full",
    }
    for name, content in tables.items():
        (folder / f"{name}.json").write_text(content)
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    (folder / "flight").mkdir()
    os.mkfifo(folder / "flight" / "rank-0.json")
    os.mkfifo(folder / "pipe.npy")
    (folder / "folder.npy").mkdir()
    (folder / "loop.npy").symlink_to("loop.npy")
    (folder / "dangling.npy").symlink_to("nowhere.npy")
    (folder / "plain_file").write_text("")


WITH_OUTPUT = "--out O.npy --lse L.npy --json R.json --csv C.csv --trace T.json"
DECODE_OUTPUT = "--out O.npy --json R.json"


def q_file_cases():
    """Each wrong file as Q; and the name must be in the complaint."""
    reasons = {
        "missing": "cannot be opened: No such file",
        "dangling": "cannot be opened: No such file",
        "loop": "cannot be opened: Too many levels",
        "folder": "is a directory",
        "pipe": "is a pipe or device",
        "empty": "is empty",
        "text": "wrong magic",
        "zip": "zip file",
        "magic_only": "first 8 bytes",
        "half_header": "ends within its header",
        "truncated": "cut short",
        "longer": "goes on after its array",
        "version_0": "version 0.0",
        "version_4": "version 4.0",
        "no_newline": "newline",
        "header_0": "header",
        "header_huge": "more than 1 MiB",
        "twice": "descr",
        "negative": "negative",
        "locale": "cut short",
        "overflow": "2.63 bytes",
        "beyond_64_bits": "64 bits",
        "fortran": "Fortran order",
        "big_endian": "big-endian",
        "ints": "signed integers",
        "complex": "complex numbers",
        "bools": "booleans",
        "longdouble": "not floats of 2, 4 or 8 bytes",
        "objects": "Python objects",
        "records": "records",
        "flat": "2 dimensions",
        "deep": "4 dimensions",
        "scalar": "single number",
        "no_tokens": "is empty",
        "no_heads": "is empty",
        "no_dim": "is empty",
    }
    return [
        Case(f"q {name}", f"run --q {name}.npy --k k.npy --v v.npy", INPUT, f"{name}.npy.*{why}")
        for name, why in reasons.items()
    ]


# fmt: off
def cases():
    run = "run --tokens 31 "
    plan = "plan --ranks 4 --tokens 31 "
    table = q_file_cases()

    def add(name, words, code, says, **more):
        table.append(Case(name, words, code, says, **more))

    # Files that do not fit together.
    add("k missing", "run --q q.npy --k none.npy --v v.npy", INPUT, "none.npy")
    add("v of other length", "run --q q.npy --k k.npy --v longer_v.npy", INPUT, "longer_v.npy.*8 tokens.*7")
    add("k of other width", "run --q q.npy --k wide_k.npy --v v.npy", INPUT, "wide_k.npy.*5.*4")
    add("k of 3 heads for 2", "run --q q.npy --k three_heads.npy --v v.npy", INPUT, "three_heads.npy.*no multiple")
    add("no k", "run --q q.npy --v v.npy", USAGE, "--q, --k and --v")
    add("files and tokens", f"run {FILES} --tokens 7", USAGE, "--tokens")
    add("files and heads", f"run {FILES} --heads 2", USAGE, "--heads")
    add("name with a line break", "run --q line_break\nin_name.npy --k k.npy --v v.npy", INPUT, r"line_break\\nin_name.*magic")
    add("dev zero", "run --q /dev/zero --k k.npy --v v.npy", INPUT, "/dev/zero.*pipe or device")
    add("plan reads files too", "plan --ranks 3 --q missing.npy --k k.npy --v v.npy", INPUT, "missing.npy")

    # dO.
    add("dO missing", f"run {FILES} --grad none.npy", INPUT, "none.npy.*No such file")
    add("dO not given", f"run {FILES} --grad", USAGE, "--grad")
    add("dO empty", f"run {FILES} --grad ''", USAGE, "--grad")
    add("dO of other length", f"run {FILES} --grad longer_v.npy", INPUT, r"longer_v.npy.*\[8, 2, 4\].*shape of O.*\[7, 2, 4\]")
    add("dO of other heads", f"run {FILES} --grad three_heads.npy", INPUT, r"three_heads.npy.*\[7, 3, 4\].*\[7, 2, 4\]")
    add("dO of other width", f"run {FILES} --grad wide_k.npy", INPUT, r"wide_k.npy.*\[7, 2, 5\].*\[7, 2, 4\]")
    add("dO flat", f"run {FILES} --grad flat.npy", INPUT, "flat.npy.*2 dimensions")
    add("dO of ints", f"run {FILES} --grad ints.npy", INPUT, "ints.npy.*signed integers")
    add("dO for generated inputs", run + "--grad do.npy", INPUT, r"do.npy.*\[7, 2, 4\].*\[31, 8, 64\]")
    add("dO twice", f"run {FILES} --grad do.npy --grad do.npy", USAGE, "--grad.*twice")
    add("grad in plan", plan + "--grad random", USAGE, "--grad")
    add("backward in run", run + "--backward", USAGE, "--backward")
    add("value of backward", plan + "--backward=yes", USAGE, "--backward")

    # Options.
    add("no command", "bogus", USAGE, "bogus.*dattn --help")
    add("no input", "run", USAGE, "--tokens")
    add("unknown option", run + "--bogus", USAGE, "--bogus.*--help")
    add("near option", run + "--head 4", USAGE, "--head.*--heads")
    add("guessed prefix", "run --toke 31", USAGE, "--toke")
    add("unknown short option", run + "-x", USAGE, "-x")
    add("repeated option", run + "--tokens 32", USAGE, "--tokens.*twice")
    add("positional", run + "extra", USAGE, "extra")
    add("positional after --", run + "-- extra", USAGE, "extra")
    add("value of a flag", run + "--check=yes", USAGE, "--check")
    add("missing value", "run --tokens", USAGE, "--tokens")
    add("empty value", "run --tokens=", USAGE, "--tokens")
    add("empty word", "run --tokens ''", USAGE, "--tokens")
    add("next option as value", "run --tokens --check", USAGE, "--tokens")
    for word in ("-1", "0", "1e3", "1.5", "0x10", "99999999999999999999", "9999999999G", "4KK", "\u0663", "+3", "nan", "1,000"):
        add(f"tokens {word}", f"run --tokens {word}", USAGE, "--tokens")
    add("control character", "run --tokens a\x1b[31m\x07", USAGE, r"--tokens.*\\x1b")
    add("long word", "run --tokens " + "9" * 60000, USAGE, "--tokens")
    for option in ("queries", "heads", "kv-heads", "value-heads", "head-dim", "value-dim", "threads", "repeat"):
        add(f"{option} 0", f"{run}--{option} 0", USAGE, f"--{option}")
    add("seed -1", run + "--seed -1", USAGE, "--seed")
    add("warmup -1", run + "--warmup -1", USAGE, "--warmup")
    add("watchdog -1", run + "--watchdog -1", USAGE, "--watchdog")
    add("no watchdog", run + "--watchdog 0", 0, "rate:")
    add("flight dir without a name", run + "--flight-dir ''", USAGE, "--flight-dir")
    add("report without a folder", "report", USAGE, "dattn report DIR")
    add("report of pipes", "report flight", INPUT, "'flight': has no flight record that can be read")
    add("report of no folder", "report none", INPUT, "'none'.*No such file")
    add("threads 100000", run + "--threads 100000", USAGE, "--threads.*1024")
    add("repeat too often", run + "--repeat 1G", USAGE, "--repeat")
    add("heads over kv heads", run + "--heads 6 --kv-heads 4", USAGE, "6 query heads.*4 key heads")
    add("heads over value heads", run + "--heads 6 --kv-heads 3 --value-heads 4", USAGE, "4 value heads")
    add("product beyond 2^60", "plan --ranks 2 --tokens 4G --heads 1K", USAGE, "2.60")
    for word in ("nan", "inf", "-inf", "1e999", "abc", "0,5", "0x1p3", "''"):
        add(f"scale {word}", f"{run}--scale {word}", USAGE, "--scale")
    add("scale beyond float32", run + "--scale -1e39", USAGE, "--scale: -1e\\+39 is beyond float32.*--dtype f8")
    add("dtype f2", run + "--dtype f2", USAGE, "--dtype.*f4")
    add("wire unknown", run + "--wire bfloat16", USAGE, "--wire.*exact, bf16")
    add("wire bf16 of f8", plan + "--dtype f8 --wire bf16", USAGE, "--wire bf16.*--dtype f4")
    add("wire bf16 checked", run + "--wire bf16 --check --grad random", 0, "PASSED.*PASSED")
    add("compensate unknown", run + "--compensate heads", USAGE, "--compensate.*off, head, rank")
    add("compensate without a value", run + "--compensate", USAGE, "--compensate")
    for how in ("head", "rank"):
        add(f"compensate {how} with gradients", f"{run}--compensate {how} --grad random --queries 5", USAGE, f"--compensate {how}.*no backward pass.*--grad")
        add(f"compensate {how} backward", f"{plan}--compensate {how} --backward", USAGE, f"--compensate {how}.*no backward pass.*--backward")
        add(f"compensate {how}", f"{run}--queries 5 --mask window:3,0 --compensate {how} --check", 0, "(?s)8 pseudo-keys.*PASSED")
        add(f"compensate {how} for nothing", f"{run}--mask window:3,0 --compensate {how} --check", 0, "(?s)nothing is dropped.*PASSED")
    add("compensate off with gradients", run + "--compensate off --check --grad random", 0, "PASSED.*PASSED")
    add("compensate on one rank only", "run --tokens 31 --threads 1 --compensate head", USAGE, "rank 1.*--compensate.*same arguments", ranks=2, other="run --tokens 31 --threads 1")
    add("strategy unknown", run + "--strategy rign", USAGE, "--strategy.*ring")
    add("partition unknown", run + "--partition zig-zag", USAGE, "--partition.*zigzag")
    for word in ("0x3", "2x", "x2", "2y3", "-1", "''", "2x3x", "99999x99999", "99999999999999999999", "1x1x1x1x1x1x1x1x1"):
        add(f"mesh {word}", f"{run}--mesh {word}", USAGE, "--mesh")
    for word in ("0", "-1", "1e9", "8GB", "''"):
        add(f"memory {word}", f"{run}--memory {word}", USAGE, "--memory")
    for word in ("0", "-1", "1.5", "1025", "''"):
        add(f"prefetch {word}", f"{run}--prefetch {word}", USAGE, "--prefetch")
    add("prefetch beyond the ranks", run + "--prefetch 1024 --check --grad random", 0, "PASSED.*PASSED")
    add("mesh for other ranks", plan + "--strategy usp --mesh 2x3", USAGE, "--mesh.*6.*4")
    add("mesh of one axis for usp", plan + "--strategy usp --mesh 4", USAGE, "--mesh.*usp")
    add("mesh of two axes for ring", plan + "--strategy ring --mesh 2x2", USAGE, "--mesh.*ring")
    add("local on four ranks", plan + "--strategy local", USAGE, "--strategy.*local")
    for word in ("0", "-1", "1e9", "1000000000", "65537", "''"):
        add(f"plan for {word} ranks", f"plan --tokens 31 --ranks {word}", USAGE, "--ranks")
    add("plan without ranks", "plan --tokens 31", USAGE, "--ranks")
    for word in ("nonsense", "latency", "latency=", "rate=0", "bandwidth=nan", "latency=-1", "rate=1e999", "latency=1;rate=2", "rate=1e-300", "bandwidth=1e31", "latency=1e7"):
        add(f"machine {word}", f"{plan}--machine {word}", USAGE, "--machine")
    for name, why in (("folder", "not a regular file"), ("pipe", "not a regular file"), ("text", "not a JSON object"), ("good", '"version"')):
        add(f"machine in {name}", f"{plan}--machine {name}.json", INPUT, f"--machine '{name}.json': .*{why}")
    add("machine in a file", plan + "--machine machine.json", 0, "verdict: ok")

    # Masks.
    for word in (
        "nonsense", "''", "causal:3", "window", "window:3", "window:3,4,5", "window:-1,0",
        "window:a,b", "window:1.5,2", "window:99999999999999999999,0", "documents:", "documents:30",
        "documents:30,2", "documents:31,", "documents:9223372036854775807,32", "prefix:", "prefix:1,2",
        "sink:x", "causal+", "+causal", "causal++full", "causal/", "(causal", "causal)", "()",
        "causal@0-3", "causal@0-3;full@5-7", "causal@4-7;full@0-3", "causal@0-8", "causal@0-3;full@3-7",
        "causal@7-0", "causal@a", "causal@0-7;", ";", "@0-7", "causal\nfull",
        "stream:", "stream:sink", "stream:sink=", "stream:=3", "stream:sink=-1", "stream:sink=1,sink=2", "stream:sunk=3",
        "stream:sink=1e3", "stream:recent=2199023255552", "span:alpha=nan", "span:beta=-1", "span:alpha=1e30", "span:unit=0",
        "dilated:", "dilated:1", "dilated:1,2", "dilated:1,2,0", "dilated:1,2,3,4", "dilated:4294967296,0,1",
        "s2:block=0", "s2:stride=0", "s2:local=0", "s2:local=2x2", "s2:relative=1,local=1x2x3", "s2:dense=9", "s2:step=x",
        "s2:relative=1,offset=3", "s2:relative=2", "neighbor", "neighbor:dims=30", "neighbor:dims=31x31", "neighbor:dims=1x1x1x31",
        "neighbor:dims=31,window=32", "neighbor:dims=31,window=0", "neighbor:dims=31,window=3,stride=4",
        "neighbor:dims=31,window=16,dilation=2", "neighbor:dims=31,window=3,causal=2", "neighbor:dims=31,window=3x3",
        "neighbor:dims=31,window=3,tile=0", "neighbor:dims=9223372036854775807x3", "neighbor:dims=31,window=3,tile=3x3",
        "batch", "batch:sequences=0", "batch:sequences=31,levels=1x3", "batch:sequences=31,levels=1", "batch:sequences=30,suffix=2",
        "batch:sequences=1099511627776", "batch:sequences=31,new=2,suffix=1", "batch:sequences=31,sizes=31",
    ):
        add(f"mask {word!r}", f"{plan}--mask {word}", USAGE, "--mask")
    for rows, columns, why in (
        ("none", "columns", "none.npy.*No such file"), ("rows", "none", "none.npy.*No such file"), ("q", "columns", "q.npy.*not signed integers"),
        ("rows", "q", "q.npy.*not signed integers"), ("rows_short", "columns", "rows_short.npy' holds 2 offsets.*take 3"),
        ("rows_shifted", "columns", "rows_shifted.npy'.*begin with 1"), ("rows", "columns_short", "columns_short.npy' holds 2 blocks.*end at 3"),
        ("rows", "columns_back", "columns_back.npy'.*ascend"), ("rows", "columns_far", "columns_far.npy'.*block 2 of query block 1"),
    ):
        for start in (plan, run):
            add(f"blocks of {rows} and {columns} {start}", f"{start}--mask blocks:size=16,rows={rows}.npy,columns={columns}.npy", INPUT, why)
    blocks = "--mask blocks:size=16,rows=rows.npy,columns="
    add("blocks", plan + blocks + "columns.npy", 0, "verdict: ok")
    add("blocks checked", run + blocks + "columns.npy --check --grad random", 0, "PASSED.*PASSED")
    documents = "--mask documents:offsets="
    add("documents from a file", f"{run}{documents}offsets.npy --check", 0, "documents:offsets=offsets.npy.*PASSED")
    add("documents that go back", f"{plan}{documents}offsets_back.npy", INPUT, "--mask: offsets=.*offsets_back.npy.* has 8 behind 9; give ")
    add("documents of other keys", f"{plan}{documents}rows.npy", INPUT, "rows.npy.* ends with 3; .*31, the number of keys")
    add("documents of floats", f"{plan}{documents}weights.npy", INPUT, "weights.npy.*integers")
    add("documents of three dimensions", f"{plan}{documents}ints.npy", INPUT, "ints.npy.* holds no list of offsets")
    add("documents from no file", f"{plan}{documents}none.npy", INPUT, "none.npy.*No such file")
    add("documents of the root without quotes", f"{plan}{documents}/r.npy", USAGE, "'offsets=' is not name=value.*double quotes")
    add("blocks of the root without quotes", plan + "--mask blocks:size=16,rows=/r.npy,columns=/c.npy", USAGE, "'rows=' is not name=value.*double quotes")
    add("blocks in a folder without quotes", plan + "--mask blocks:size=16,rows=d/rows.npy,columns=c", USAGE, "double quotes")
    add("out over a mask's file", run + blocks + "columns.npy --out columns.npy", USAGE, "columns.npy.*input")
    batch = "--mask batch:sequences=5,new=2,levels=2x30,suffix=3"
    add("batch that says its lengths", f"run {batch} --check", 0, "10 queries, 75 keys.*PASSED")
    add("batch of other lengths", f"run {batch} --tokens 75", USAGE, "--mask.*10 queries and 75 keys.*not 75 queries and 75 keys")
    add("batch of other queries", f"run {batch} --queries 3", USAGE, "--mask.*10 queries and 75 keys.*not 3 queries and 75 keys")
    add("batch in other files", f"run {FILES} {batch}", USAGE, "--mask.*10 queries and 75 keys.*not 7 queries and 7 keys")
    add("batch that says no lengths", "run --mask batch:new=2", USAGE, "--mask.*sequences")
    add("batch among others without lengths", f"run {batch}+causal", USAGE, "--tokens")
    add("mask of deep parentheses", f"{plan}--mask {'(' * 50000}full{')' * 50000}", USAGE, "--mask")
    for name, why in (
        ("none", "No such file"), ("folder", "not a regular file"), ("pipe", "not a regular file"), ("empty", "not JSON"),
        ("text", "not JSON"), ("list", "not an object"), ("unknown", "nothing is called 'mosk'"), ("number", "not a string"),
        ("table", "itself a table"), ("twice", "head 3 has two masks"), ("missing", "head 4 has no mask"),
        ("beyond", "'8' is not a list of heads below 8"), ("back", "counts down"), ("words", "no mask is called 'casual'"),
        ("heads", "'heads' is not an object"), ("layers", "layer 2 stands twice"),
    ):
        code = INPUT
        add(f"head masks {name}", f"{plan}--head-masks {name}.json --layer 2" if name == "layers" else f"{plan}--head-masks {name}.json", code, f"--head-masks.*{name}.json.*{why}")
    add("head masks and a mask", plan + "--head-masks good.json --mask causal", USAGE, "--mask and --head-masks")
    add("layer without head masks", plan + "--layer 3", USAGE, "--layer")
    add("layer of a file without", plan + "--head-masks good.json --layer 3", USAGE, "--layer 3.*no layers")
    add("layers without a layer", plan + "--head-masks layered.json", USAGE, "--layer")
    add("layer beyond the file", plan + "--head-masks layered.json --layer 9", USAGE, "--layer 9")
    add("head masks", plan + "--head-masks good.json", 0, "")
    add("head masks of a layer", plan + "--head-masks layered.json --layer 1", 0, "")
    add("mask at run", run + "--mask windw:3,4", USAGE, "--mask.*windw")

    # Environment.
    for word in ("0", "abc", "-4", "4;2", "1e1", "99999"):
        add(f"OMP_NUM_THREADS {word}", run, USAGE, "OMP_NUM_THREADS", environment={"OMP_NUM_THREADS": word})
    add("OMP_NUM_THREADS 4,2", run + "--check", 0, "PASSED", environment={"OMP_NUM_THREADS": "4,2"})
    add("OMP_NUM_THREADS empty", run + "--check", 0, "PASSED", environment={"OMP_NUM_THREADS": ""})
    add("DATTN_ISA nonsense", run, USAGE, "DATTN_ISA.*nonsense.*portable", environment={"DATTN_ISA": "nonsense"})
    add("DATTN_ISA portable", run + "--check", 0, "PASSED", environment={"DATTN_ISA": "portable"})
    add("locale that does not exist", run + "--scale 0.125 --check", 0, "PASSED", environment={"LC_ALL": "xx_YY.UTF-8"})
    add("Slurm tasks", run, USAGE, "srun.*--mpi=pmix", environment={"SLURM_NTASKS": "4"})

    # Memory.
    add("too much memory", "run --tokens 4M --heads 64 --head-dim 128 --threads 1", MEMORY, "needs .*iB.*has .*iB")
    add("one giant head", "run --tokens 1 --heads 1 --head-dim 64G --threads 1", MEMORY, "needs .*iB.*has .*iB")
    add("many giant heads", "run --tokens 8 --heads 64K --head-dim 1M --threads 1", MEMORY, "needs .*iB.*has .*iB")

    add("too much memory backward", "run --tokens 4M --heads 64 --head-dim 128 --threads 1 --grad random", MEMORY, "needs .*iB.*has .*iB")

    add("less memory than any strategy needs", run + "--memory 1", MEMORY, "local needs .*iB on a rank, which has 1 B.*--memory")
    add("less memory than the plan needs", plan + "--strategy ring --backward --memory 1K", MEMORY, "ring needs .*iB on a rank, which has 1.0 KiB.*--memory")

    # Outputs.
    for option in ("out", "lse", "json", "csv", "trace"):
        add(f"{option} into nowhere", f"{run}--{option} nowhere/x", OUTPUT, "nowhere/x.*mkdir")
    for option in ("dq", "dk", "dv"):
        add(f"{option} into nowhere", f"{run}--grad random --{option} nowhere/x", OUTPUT, "nowhere/x.*mkdir")
        add(f"{option} empty", f"{run}--grad random --{option} ''", USAGE, f"--{option}")
        add(f"{option} to stdout", f"{run}--grad random --{option} -", USAGE, f"--{option}")
        add(f"{option} without grad", f"{run}--{option} D.npy", USAGE, f"--{option}.*--grad")
    add("dk over do", f"run {FILES} --grad do.npy --dk do.npy", USAGE, "do.npy.*input")
    add("dv over dq", run + "--grad random --dq D.npy --dv ./D.npy", USAGE, "D.npy.*output")
    add("dq over out", run + "--grad random --out D.npy --dq D.npy", USAGE, "D.npy.*output")
    add("out is a folder", run + "--out folder.npy", OUTPUT, "folder.npy.*directory")
    add("out ends in a slash", run + "--out nowhere/", OUTPUT, "nowhere/")
    add("out below a file", run + "--out plain_file/x", OUTPUT, "plain_file/x")
    add("out is a device", run + "--out /dev/full", OUTPUT, "/dev/full")
    add("out is a pipe", run + "--out pipe.npy", OUTPUT, "pipe.npy")
    add("out in a loop", run + "--out loop.npy", OUTPUT, "loop.npy")
    add("out in /proc", run + "--out /proc/x.npy", OUTPUT, "/proc/x.npy")
    add("name too long", run + "--out " + "n" * 300, OUTPUT, "nnn")
    add("out to stdout", run + "--out -", USAGE, "--out")
    add("lse to stdout", run + "--lse -", USAGE, "--lse")
    for option in ("out", "lse", "json", "csv", "trace"):
        add(f"{option} empty", f"{run}--{option} ''", USAGE, f"--{option}")
    add("out over q", f"run {FILES} --out q.npy", USAGE, "q.npy.*input")
    add("lse over v", f"run {FILES} --lse ./folder.npy/../v.npy", USAGE, "v.npy.*input")
    add("out twice", run + "--out O.npy --lse ./O.npy", USAGE, "O.npy.*output")
    add("json over csv", run + "--json X --csv X", USAGE, "X.*output")
    add("two reports to stdout", run + "--json - --csv -", USAGE, "--json, --csv")
    add("plan json into nowhere", plan + "--json nowhere/x", OUTPUT, "nowhere/x.*mkdir")
    add("plan json over q", f"plan --ranks 4 {FILES} --json q.npy", USAGE, "q.npy.*input")
    add("plan json over head masks", plan + "--head-masks good.json --json good.json", USAGE, "good.json.*input")
    add("plan json over a mask's file", f"{plan}{blocks}columns.npy --json rows.npy", USAGE, "rows.npy.*input")
    add("trace over the machine's file", run + "--machine machine.json --trace machine.json", USAGE, "machine.json.*input")
    add("plan json empty", plan + "--json ''", USAGE, "--json")

    # Conversion of weights.
    layer = "convert --q-proj wq.npy --k-proj wk.npy --v-proj wv.npy --o-proj wo.npy --heads 4 --kv-heads 2 --held-out 3 --kv-rank 9 "
    small = "convert --hidden 12 --heads 4 --kv-heads 2 --head-dim 4 --tokens 40 --held-out 5 "
    add("convert", small + "--rope-dim 8 --kv-rank 8", 0, "merge.*PASSED.*RoRoPE.*PASSED.*latent of 8 of 8.*PASSED")
    add("convert files", layer + "--rope-dim 6 --tokens 9", 0, "latent of 9 of 18")
    add("convert without a file", "convert --q-proj wq.npy --k-proj wk.npy --v-proj wv.npy", USAGE, "--o-proj.*all or none")
    add("convert missing file", layer.replace("wv", "none"), INPUT, "none.npy.*No such file")
    add("convert flat q", layer.replace("wq", "q"), INPUT, "--q-proj.*q.npy.*3 dimensions")
    add("convert other k", layer.replace("wk", "wq"), INPUT, r"--k-proj.*wq.npy.*\[24, 10\]; it must be \[12, 10\]")
    add("convert other o", layer.replace("wo", "wq"), INPUT, r"--o-proj.*wq.npy.*\[24, 10\]; it must be \[10, 24\]")
    add("convert heads that do not divide", layer.replace("--heads 4", "--heads 5"), INPUT, "wq.npy.*24 rows.*5 heads.*--heads")
    add("convert ints", layer.replace("wk", "ints"), INPUT, "ints.npy.*signed integers")
    add("convert hidden of files", layer + "--hidden 10", USAGE, "--hidden.*leave it out")
    add("convert 4 heads over 3", "convert --heads 4 --kv-heads 3", USAGE, "4 heads are no multiple of 3")
    add("convert odd head", "convert --head-dim 5", USAGE, "head's dim is 5.*even")
    add("convert rope base", small + "--rope-base 1", USAGE, "--rope-base.*exceed 1")
    for word in ("3", "6", "16", "1K"):
        add(f"convert rope dim {word}", f"{small}--kv-rank 4 --rope-dim {word}", USAGE, "d_rope is.*divisor of the head's dim 4")
    add("convert kv rank", small + "--rope-dim 4 --kv-rank 13", USAGE, "kv rank is 13; want 1 to 12")
    add("convert fold", small + "--rope-dim 2 --kv-rank 4 --freqfold 1", USAGE, "fold of frequencies is 1.*multiple of 2")
    add("convert balance", small + "--rope-dim 2 --kv-rank 4 --balance 0", USAGE, "balance")
    add("convert calibration missing", layer + "--rope-dim 6 --calibration none.npy", INPUT, "none.npy.*No such file")
    add("convert calibration of other width", layer + "--rope-dim 6 --calibration wo.npy", INPUT, "--calibration.*wo.npy.*24 numbers a token.*10")
    add("convert calibration of NaN", layer + "--rope-dim 6 --calibration x_nan.npy --out M --json R.json", INPUT, "finite")
    add("convert all held out", small.replace("--held-out 5", "--held-out 40") + "--rope-dim 4 --kv-rank 4", USAGE, "--held-out.*40 of 40")
    add("convert into nowhere", small + "--rope-dim 4 --kv-rank 4 --out nowhere/x", OUTPUT, "nowhere/x.json.*mkdir")
    add("convert into /proc", small + "--rope-dim 4 --kv-rank 4 --out /proc/x", OUTPUT, "/proc/x")
    add("convert json over a matrix", small + "--rope-dim 4 --kv-rank 4 --out M --json M.out.npy", USAGE, "M.out.npy.*output")
    add("convert too much memory", "convert --hidden 1M --heads 4K --kv-heads 8", MEMORY, "needs .*iB.*has .*iB")
    add("convert on 2 ranks", small + "--rope-dim 4 --kv-rank 4", 0, "latent of 4 of 12", ranks=2)
    add("convert fails on 2 ranks", layer.replace("wv", "none"), INPUT, "rank 0.*none.npy.*No such file", ranks=2)

    # The check itself: scores in the hundreds, whose rounding float32 cannot hide.
    add("check of gradients fails", "run --tokens 101 --scale 30 --check --threads 1 --grad random", 1, "check of gradients.*FAILED")
    add("check of gradients", run + "--check --grad random", 0, "check of gradients.*PASSED")
    add("check fails", "run --tokens 101 --scale 30 --check --threads 1", 1, "FAILED")
    add("list with words", "list extra", USAGE, "extra")
    add("help", "run --help", 0, "--strategy")
    add("version", "--version", 0, "dattn [0-9]")

    # Several ranks: one line, from the rank that knows.
    many = "run --tokens 31 --threads 1 "
    add("unknown option on 3 ranks", many + "--bogus", USAGE, "rank 0.*--bogus", ranks=3)
    add("missing file on 3 ranks", "run --q missing.npy --k k.npy --v v.npy", INPUT, "missing.npy", ranks=3)
    add("missing file on rank 2", f"run {FILES}", INPUT, "rank 2.*missing.npy", ranks=3, other="run --q missing.npy --k k.npy --v v.npy")
    add("another file on rank 1", f"run {FILES} --threads 1", USAGE, "rank 1.*--q.*same arguments", ranks=2, other="run --q other_q.npy --k k.npy --v v.npy --threads 1")
    add("dO missing on rank 1", f"run {FILES} --grad do.npy", INPUT, "rank 1.*missing.npy", ranks=2, other=f"run {FILES} --grad missing.npy")
    add("dO on one rank only", many + "--grad random", USAGE, "rank 1.*--grad.*same arguments", ranks=2, other=many)
    add("dK into nowhere on 2 ranks", many + "--grad random --dk nowhere/x", OUTPUT, "nowhere/x", ranks=2)
    add("output into nowhere on 2 ranks", many + "--out nowhere/x", OUTPUT, "nowhere/x", ranks=2)
    add("output into /proc on 2 ranks", many + "--out /proc/x.npy", OUTPUT, "rank 0.*/proc/x.npy", ranks=2)
    add("mesh 2x2 on 3 ranks", many + "--strategy usp --mesh 2x2", USAGE, "--mesh.*4.*3", ranks=3)
    add("local on 2 ranks", many + "--strategy local", USAGE, "--strategy.*local", ranks=2)
    add("memory on 2 ranks", "run --tokens 4M --heads 64 --head-dim 128 --threads 1", MEMORY, "needs .*iB", ranks=2)
    add("little memory on 2 ranks", many + "--strategy usp --grad random --memory 1K", MEMORY, "rank 0.*usp needs .*iB.*has 1.0 KiB", ranks=2)
    add("DATTN_ISA on 2 ranks", many, USAGE, "DATTN_ISA", ranks=2, environment={"DATTN_ISA": "nonsense"})
    for field, first, second in (
        ("--tokens", "31", "32"),
        ("--mask", "full", "causal"),
        ("--seed", "1", "2"),
        ("--scale", "0.5", "0.25"),
        ("--soft-cap", "0.5", "0.25"),
        ("--alibi", "0.5", "0.25"),
        ("--sinks", "0.5", "0.25"),
        ("--sigmoid", "auto", "0.25"),
        ("--strategy", "ring", "gather"),
        ("--partition", "zigzag", "striped"),
        ("--dtype", "f4", "f8"),
        ("--wire", "bf16", "exact"),
        ("--compensate", "head", "rank"),
        ("--repeat", "1", "2"),
        ("--warmup", "0", "1"),
        ("--out", "O.npy", "P.npy"),
        ("--head-dim", "8", "16"),
        ("--memory", "1G", "2G"),
        ("--prefetch", "1", "2"),
        ("--relay", "on", "off"),
    ):
        common = "run --threads 1 " + ("" if field == "--tokens" else "--tokens 31 ")
        name = {"--tokens": "queries", "--head-dim": "head dim", "--scale": "scale", "--dtype": "dtype"}
        says = f"rank 1.*{name.get(field, field)}.*where rank 0.*same arguments"
        add(f"ranks differ in {field}", f"{common}{field} {first}", USAGE, says, ranks=2, other=f"{common}{field} {second}")
    bad_scores.score_cases(add)
    bad_decode_permute.decode_cases(add)
    bad_decode_permute.permute_cases(add)
    add("one rank checks", many, USAGE, "rank 1.*--check", ranks=2, other=many + "--check")
    add("one rank has an output", many, USAGE, "rank 1.*--out", ranks=2, other=many + "--out O.npy")
    return table
# fmt: on


def split(words):
    return ["" if word == "''" else word for word in words.split(" ") if word]


class Folder:
    """A scratch folder with the fixtures, which a refusal must leave as it was."""

    def __init__(self, path):
        self.path = path
        write_fixtures(path)
        self.before = self.listing()

    def listing(self):
        return sorted((p.name, p.lstat().st_size) for p in self.path.iterdir())

    def changes(self):
        """What is new or of another size; removes new files, so that the next case starts clean."""
        changed = [name for name, size in self.listing() if (name, size) not in self.before]
        for name in changed:
            if all(name != old for old, _ in self.before):
                (self.path / name).unlink()
        return changed


def complaints(err, alone):
    """The lines that are dattn's: alone nobody else may say anything, under mpirun mpirun may."""
    # libgomp complains of OMP_NUM_THREADS before main() begins.
    lines = [line for line in err.splitlines() if line and not line.startswith("libgomp: ")]
    lines = [line for line in lines if not line.startswith("# memory ")]  # the table before it
    return lines if alone else [line for line in lines if "[rank " in line]


def judge(case, start, folder):
    """None, or what is wrong."""
    words = split(case.words)
    refused = case.code not in (0, 1)
    possible = {"run": WITH_OUTPUT, "decode": DECODE_OUTPUT}.get(words[0], "").split()
    if refused and not any(w in possible for w in words):
        outputs = possible
    else:
        outputs = []
    if case.other:
        outputs = []  # the ranks of these differ in just one thing
        line = [*start.mpirun, "-np", str(case.ranks - 1), start.dattn, *words]
        line += [":", "-np", "1", start.dattn, *split(case.other)]
    else:
        line = start.line([*words, *outputs], case.ranks)
    done = start.run_line(line, case.environment, timeout=60, cwd=folder.path)
    if done.returncode != case.code:
        return f"exit code {done.returncode}, not {case.code}\n{done.stdout}{done.stderr}"
    if not refused:
        if not re.search(case.says, done.stdout, re.DOTALL):
            return f"stdout does not say {case.says!r}:\n{done.stdout}{done.stderr}"
        return None
    lines = complaints(done.stderr, alone=case.ranks == 0)
    if len(lines) != 1:
        return f"{len(lines)} lines of complaint, not 1:\n{done.stderr}"
    if not re.match(r"\[rank \d+\] dattn", lines[0]) or not lines[0].isprintable():
        return f"the complaint is {lines[0]!r}"
    if len(lines[0]) > 1200:
        return f"the complaint has {len(lines[0])} characters"
    if not re.search(case.says, lines[0]):
        return f"the complaint does not say {case.says!r}: {lines[0]}"
    if any(word in done.stdout for word in SUCCESS):
        return f"stdout looks like success:\n{done.stdout}"
    if changed := folder.changes():
        return f"it left or changed {changed}"
    return None


# What is no table row: limits, closed streams, and ranks that die.


def full_or_closed_stdout(start, folder):
    """A report that cannot be printed is an output error, not silence."""
    for words in ("list", "plan --ranks 2 --tokens 31", "plan --ranks 2 --tokens 31 --json -",
                  "--help", "run --help", "run --tokens 31 --out O.npy", "run --tokens 31 --json -",
                  "decode --context 31 --out O.npy", "permute --dims 7 --tile 2 --in q.npy --out O.npy"):  # fmt: skip
        for name, stdout in (("full", ">/dev/full"), ("closed", ">&-")):
            line = ["sh", "-c", f'exec "$0" "$@" {stdout}', start.dattn, *words.split()]
            done = start.run_line(line, ONE_THREAD, timeout=60, cwd=folder.path)
            if done.returncode != OUTPUT:
                return f"dattn {words} with stdout {name}: exit code {done.returncode}: {done.stderr}"
            # With the report on stdout, the heading is on stderr.
            lines = [x for x in done.stderr.splitlines() if not x.startswith(("#", "problem:", "forecasts:", "plan:"))]
            if len(lines) != 1 or "standard output" not in lines[0]:
                return f"dattn {words} with stdout {name} says: {done.stderr}"
            if changed := folder.changes():
                return f"dattn {words} with stdout {name} left {changed}"
    return None


def closed_stderr(start, folder):
    """Descriptor 2 must not become an output file that the complaint goes into."""
    for words, code in (("run --tokens 31 --bogus", USAGE), ("run --tokens 31 --mask causal", 0)):
        line = ["sh", "-c", 'exec "$0" "$@" 2>&-', start.dattn, *words.split()]
        done = start.run_line(line, ONE_THREAD, timeout=60, cwd=folder.path)
        if done.returncode != code:
            return f"dattn {words}: exit code {done.returncode}, not {code}"
    return None


def disk_full(start, folder):
    """A limit on file sizes stands for a full disk; MPI's own files stay below it, O does not."""
    limit = 32 << 20
    words = f"--tokens 4K --heads 64 --head-dim 1 --value-dim 64 --mask window:0,0 {WITH_OUTPUT}"
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    line = start.line(["run", *words.split()])
    done = start.run_line(line, ONE_THREAD, timeout=60, cwd=folder.path, preexec_fn=limited)
    if done.returncode != OUTPUT or len(done.stderr.splitlines()) != 1:
        return f"exit code {done.returncode}: {done.stderr}"
    if "O.npy" not in done.stderr or "no room" not in done.stderr:
        return f"it says {done.stderr}"
    changed = folder.changes()
    return f"it left {changed}" if changed else None


def second_output_fails(start, folder):
    """O fits and LSE does not: then there is no O either."""
    # In /proc no file can be made, but its permissions do not say so.
    done = start.run("run --tokens 31 --out O.npy --lse /proc/x.npy".split(), 0, ONE_THREAD, 60, cwd=folder.path)
    if done.returncode != OUTPUT or len(done.stderr.splitlines()) != 1:
        return f"exit code {done.returncode}: {done.stderr}"
    if changed := folder.changes():
        return f"it left {changed}"
    return None


def unwritable_for_others(start, folder):
    """A folder and a file without permission, as a user who is not root."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        return "there is no setpriv to drop root with (package util-linux)"
    locked = folder.path / "locked"
    locked.mkdir(mode=0o555)
    secret = folder.path / "secret.npy"
    shutil.copy(folder.path / "q.npy", secret)
    secret.chmod(0)
    mode = folder.path.stat().st_mode
    folder.path.chmod(0o755)
    nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups".split() if os.geteuid() == 0 else []
    dattn = shutil.copy(start.dattn, folder.path / "dattn_copy")  # the build may be out of reach
    try:
        for words, code, says in (
            ("plan --ranks 2 --tokens 31 --json locked/r.json", OUTPUT, "locked/r.json.*Permission"),
            ("plan --ranks 2 --q secret.npy --k k.npy --v v.npy", INPUT, "secret.npy.*Permission"),
        ):
            done = start.run_line([*nobody, dattn, *words.split()], timeout=60, cwd=folder.path)
            if done.returncode != code or not re.search(says, done.stderr):
                return f"dattn {words}: exit code {done.returncode}: {done.stderr}"
    finally:
        folder.path.chmod(mode)
        locked.rmdir()
        secret.unlink()
        (folder.path / "dattn_copy").unlink()
    return None


def other_locale(start, folder):
    """Where 0,5 is a half, 0.5 still is one, and the reports have points."""
    names = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.split()
    german = next((name for name in names if name.startswith("de_")), "")
    if not german:
        print("     (no de_ locale here: not tried)")
        return None
    done = start.run("run --tokens 31 --scale 0.125 --csv -".split(), 0, {**ONE_THREAD, "LC_ALL": german}, 60)
    return None if done.returncode == 0 and "0." in done.stdout else done.stdout + done.stderr


def names_that_are_no_utf_8(start, folder):
    """Reports say them with their bytes escaped; a manifest, which must find them again, refuses them."""
    for name in ("rows", "columns"):
        shutil.copy(folder.path / f"{name}.npy", folder.path / f"{name}\udcff.npy")
    mask = "blocks:size=16,rows=rows\udcff.npy,columns=columns\udcff.npy"
    for words in ("run --tokens 31", "plan --ranks 2 --tokens 31", "decode --context 30 --steps 1 --warmup 0", "bench --tokens 31 --repeat 1"):
        report = "--out" if words.startswith("bench") else "--json"
        done = start.run([*words.split(), report, "R.json", "--mask", mask], 0, ONE_THREAD, 60, cwd=folder.path)
        if done.returncode != 0 or r"rows\\xff.npy" not in (folder.path / "R.json").read_text():
            return f"dattn {words}: exit code {done.returncode}: {done.stderr}"
        (folder.path / "R.json").unlink()
    if "with xxHash" in start.run(["--version"]).stdout:
        done = start.run(["run", "--tokens", "31", "--out", "o\udcff.npy", "--manifest", "M.json"], 0, ONE_THREAD, 60, cwd=folder.path)
        if done.returncode != USAGE or not re.search(r"--manifest.*o\\xff.npy.*rename", done.stderr):
            return f"manifest: exit code {done.returncode}: {done.stderr}"
    for name in ("rows", "columns"):
        (folder.path / f"{name}\udcff.npy").unlink()
    changed = folder.changes()
    return f"it left {changed}" if changed else None


def threads_of_one_rank_only(start, folder):
    """OMP_NUM_THREADS set for one rank and not for the other must not part their ways."""
    run = [start.dattn, "run", "--tokens", "31", "--check"]
    line = [*start.mpirun, "-np", "1", "env", "OMP_NUM_THREADS=1", *run]
    line += [":", "-np", "1", "env", "-u", "OMP_NUM_THREADS", *run]
    done = start.run_line(line, timeout=60, cwd=folder.path)
    good = done.returncode == 0 and "PASSED" in done.stdout
    return None if good else f"exit code {done.returncode}: {done.stdout}{done.stderr}"


def ranks_read_other_blocks(start, folder):
    """The same names, other numbers: block lists on a disk of each rank's own."""
    with tempfile.TemporaryDirectory() as other:
        numpy.save(pathlib.Path(other) / "rows.npy", numpy.array([0, 1, 3]))
        numpy.save(pathlib.Path(other) / "columns.npy", numpy.array([1, 0, 1]))
        run = [start.dattn, *"run --tokens 31 --threads 1 --mask blocks:size=16,rows=rows.npy,columns=columns.npy".split()]
        line = [*start.mpirun, "-np", "1", *run, ":", "-np", "1", "--wdir", other, *run]
        done = start.run_line(line, timeout=60, cwd=folder.path)
    said = complaints(done.stderr, alone=False)
    good = done.returncode == USAGE and len(said) == 1 and "rank 1 has contents of the mask's files" in said[0]
    return None if good else f"exit code {done.returncode}: {done.stderr}"


def ranks_read_other_key_weights(start, folder):
    """The same name, other numbers: log-weights on a disk of each rank's own."""
    with tempfile.TemporaryDirectory() as other:
        numpy.save(pathlib.Path(other) / "weights.npy", numpy.zeros(31, "<f4"))
        run = [start.dattn, *"run --tokens 31 --threads 1 --key-weights weights.npy".split()]
        line = [*start.mpirun, "-np", "1", *run, ":", "-np", "1", "--wdir", other, *run]
        done = start.run_line(line, timeout=60, cwd=folder.path)
    said = complaints(done.stderr, alone=False)
    good = done.returncode == USAGE and len(said) == 1 and "rank 1 has contents of the scores' files" in said[0]
    return None if good else f"exit code {done.returncode}: {done.stderr}"


def pids_in(heading):
    """The process numbers in the table of ranks that run prints first."""
    return [int(pid) for pid in re.findall(r"^# +\d+ +\S+ +(\d+) ", heading, re.MULTILINE)]


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def stopped_job(start, folder, ranks, strike, words, within):
    """Starts long work, strikes when it runs, and returns (exit code, stderr, trouble or None)."""
    words = ["run", *words.split(), "--threads", "1", "--out", "O.npy", "--lse", "L.npy"]
    log = folder.path / "long.log"
    with open(log, "w") as out, open(folder.path / "long.err", "w+") as err:
        process = start.start(start.line(words, ranks), ONE_THREAD, stdout=out, stderr=err, cwd=folder.path)
        pids = []
        try:
            if not jobs.wait_for(lambda: "plan:" in log.read_text(), 60):
                return process.poll(), "", "it did not start within 60 s"
            pids = pids_in(log.read_text())
            time.sleep(1)
            if len(pids) != max(1, ranks) or process.poll() is not None:
                return process.poll(), "", "it was over too early, or has no table of ranks"
            strike(process, pids)
            begun = time.monotonic()
            try:
                code = process.wait(timeout=within)
            except subprocess.TimeoutExpired:
                return None, "", f"it did not end within {within} s"
            trouble = None
            if not jobs.wait_for(lambda: not any(alive(pid) for pid in pids), 10):
                trouble = "ranks live on after mpirun has ended"
            print(f"      ended after {time.monotonic() - begun:.1f} s with exit code {code}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)
        err.seek(0)
        said = err.read()
    log.unlink()
    (folder.path / "long.err").unlink()
    if trouble is None and (changed := folder.changes()):
        trouble = f"it left {changed}"
    return code, said, trouble


LONG = "--tokens 96K --heads 4 --head-dim 64 --strategy ring --mask full"


def decode_reads_other_files(start, folder):
    """The same names, other head counts: files on a disk of each rank's own."""
    with tempfile.TemporaryDirectory() as other:
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            numpy.save(pathlib.Path(other) / f"{name}.npy", numpy.ones((7, heads, 4), numpy.float32))
        run = [start.dattn, *f"decode {FILES} --context 3 --steps 3 --threads 1 --out O.npy".split()]
        line = [*start.mpirun, "-np", "1", *run, ":", "-np", "1", "--wdir", other, *run]
        done = start.run_line(line, timeout=60, cwd=folder.path)
    said = complaints(done.stderr, alone=False)
    good = done.returncode == USAGE and len(said) == 1 and "rank 1 has query heads '4' where rank 0 has '2'" in said[0]
    changed = folder.changes()
    return None if good and not changed else f"exit code {done.returncode}: {done.stderr}, left {changed}"


def killed_rank(start, folder):
    strike = lambda process, pids: os.kill(pids[1], signal.SIGKILL)
    code, _, trouble = stopped_job(start, folder, 3, strike, LONG, 10)
    return trouble or (None if code != 0 else "exit code 0")


def terminated_mpirun(start, folder):
    strike = lambda process, pids: process.send_signal(signal.SIGTERM)
    code, _, trouble = stopped_job(start, folder, 3, strike, LONG, 10)
    return trouble or (None if code != 0 else "exit code 0")


def interrupted_alone(start, folder):
    for sign in (signal.SIGINT, signal.SIGTERM):
        strike = lambda process, pids: process.send_signal(sign)
        code, said, trouble = stopped_job(start, folder, 0, strike, LONG.replace("ring", "local"), 10)
        if trouble:
            return trouble
        if code != INTERRUPTED or len(said.splitlines()) != 1 or "interrupted" not in said:
            return f"{sign.name}: exit code {code}, not {INTERRUPTED}: {said}"
    return None


def interrupted_while_writing(start, folder):
    """The temporary goes with the process that is told to end, by a terminal that closes too."""
    words = "run --tokens 8K --heads 64 --head-dim 1 --value-dim 128 --mask window:0,0 --out O.npy"
    for _ in range(3):  # the moment is short: try again when the file was complete before the signal
        process = start.start(start.line(words.split()), ONE_THREAD, cwd=folder.path)
        writing = lambda: any(folder.path.glob("O.npy.tmp.*"))
        jobs.wait_for(lambda: writing() or process.poll() is not None, 60)
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=60)
        if process.returncode == 0:
            (folder.path / "O.npy").unlink()
            continue
        if changed := folder.changes():
            return f"it left {changed}"
        return None if process.returncode == INTERRUPTED else f"{process.returncode}: {said}"
    return "three times the file was complete before the signal came"


SPECIAL = (
    full_or_closed_stdout,
    closed_stderr,
    disk_full,
    second_output_fails,
    unwritable_for_others,
    other_locale,
    names_that_are_no_utf_8,
    threads_of_one_rank_only,
    ranks_read_other_blocks,
    ranks_read_other_key_weights,
    decode_reads_other_files,
    killed_rank,
    terminated_mpirun,
    interrupted_alone,
    interrupted_while_writing,
)


def in_folders(tests):
    """Yields the verdicts of functions of (folder), in order: several at a time, because much of a start
    is waiting. Each has a folder of its own meanwhile."""
    with contextlib.ExitStack() as ending:
        folders = queue.SimpleQueue()
        for _ in range(WORKERS):
            folders.put(Folder(pathlib.Path(ending.enter_context(tempfile.TemporaryDirectory()))))

        def verdict(test):
            folder = folders.get()
            try:
                return test(folder)
            finally:
                folder.changes()  # no case inherits what another left
                folders.put(folder)

        pool = ending.enter_context(concurrent.futures.ThreadPoolExecutor(WORKERS))
        yield from pool.map(verdict, tests)


def one_by_one(tests):
    """The same, for tests with signals and limits."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(pathlib.Path(scratch))
        for test in tests:
            yield test(folder)
            folder.changes()


def main(arguments):
    only, start = jobs.asked(arguments, __doc__)
    table = [(case.name, functools.partial(judge, case, start)) for case in cases()]
    special = [(f.__name__, functools.partial(f, start)) for f in SPECIAL]
    count = failures = 0
    for judge_all, tests in ((in_folders, table), (one_by_one, special)):
        tests = [(name, test) for name, test in tests if only in name]
        for (name, _), complaint in zip(tests, judge_all([test for _, test in tests]), strict=True):
            count += 1
            failures += complaint is not None
            print("ok   " if complaint is None else "FAIL ", name, flush=True)
            if complaint is not None:
                print("      " + complaint.strip().replace("\n", "\n      "), flush=True)
    print(f"{count} cases, {failures} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
