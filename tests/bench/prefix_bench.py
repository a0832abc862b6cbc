"""Runs bench_prefix on small problems: the figures of a row fit together, areas are NumPy's.

    prefix_bench.py BENCH
"""

import json
import math
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "launcher"))
import oracle  # noqa: E402

LEVELS = ("1x100", "1x60:4x20", "2x10:4x30:8x7")
HEADS, DIM = 4, 16


def run(*words, code=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def check(row):
    assert row["mask"] == f"batch:sequences={row['sequences']},levels={row['levels']},suffix=9", row
    queries, keys = oracle.batch_lengths(row["mask"])
    flops = int(oracle.allowed(row["mask"], queries, keys, HEADS, 2).sum()) * 4 * DIM
    assert math.isclose(row["gflops"] * 1e9 * row["seconds"], flops, rel_tol=1e-9), (row, flops)
    assert row["seconds"] > 0 and row["alone_seconds"] > 0 and row["speedup"] > 0, row
    assert row["sample"] == min(8, row["sequences"]) and row["repeats"] == 2, row
    for level in ("last", "first"):
        assert (row[f"{level}_seconds"] is None) == (":" not in row["levels"]), row
        assert (row[f"{level}_saved"] is None) == (":" not in row["levels"]), row


def main():
    bench = sys.argv[1]
    shape = ("--heads", str(HEADS), "--kv-heads", "2", "--head-dim", str(DIM), "--suffix", "9", "--repeat", "2")
    words = (bench, *shape, "--sequences", "8,13", "--dtype", "f32,bf16", "--levels")
    rows = [json.loads(line) for line in run(*words, LEVELS[0], "--json")[0].splitlines()]
    assert [(row["dtype"], row["sequences"]) for row in rows] == [
        (dtype, sequences) for dtype in ("f32", "bf16") for sequences in (8, 13)
    ]
    rows += [json.loads(line) for line in run(bench, *shape, "--sequences", "8", "--levels", *LEVELS, "--json")[0].splitlines()]
    for row in rows:
        check(row)
    text = run(bench, *shape, "--sequences", "8", "--levels", *LEVELS[1:])[0]
    assert text.count("on the last level alone") == 2 and "times as fast" in text, text
    for wrong in (
        ("--levels", "1x0"), ("--levels", "3"), ("--levels", "2x3x4"), ("--levels", "9x1", "--sequences", "8"),
        ("--sequences", "0"), ("--sequences", "9999999"), ("--levels", "1x2:"), ("--threads", "1e9"),
    ):
        out, err = run(bench, *shape, *wrong, code=2)
        assert len(err.splitlines()) == 1 and not out, (wrong, err)


main()
