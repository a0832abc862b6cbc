"""Runs bench_forecast on a small problem: a row for each plan, and sums that follow from the rows.

    forecast_bench.py BENCH
"""

import re
import subprocess
import sys

PARTITIONS = ("contiguous", "zigzag", "striped", "balanced")
MASKS = ("causal", "window:20,0")


def run(*words, code=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def main(bench):
    words = ["--tokens", "200", "--heads", "2", "--head-dim", "16", "--ranks", "3", "--strategies", "ring,ulysses"]
    machine = ["--machine", "latency=1e-6,bandwidth=1e9,rate=1e10,backward_rate=1e10,rows=1e9,packs=1e9,lanes=8,granule=6"]
    lines = run(bench, "--mask", *MASKS, *words, *machine)[0].splitlines()
    rows = [line.split() for line in lines if re.match(r"\S+ +(forward|backward) ", line)]
    plans = [(*row[:2], f"{row[2]} {row[3]}") for row in rows]
    assert plans == [(m, p, f"{s} {cut}") for m in MASKS for p in ("forward", "backward") for s in ("ring", "ulysses") for cut in PARTITIONS], plans
    assert all(float(x) > 0 for row in rows for x in row[4:7]), rows
    near = re.search(r"within 15 percent of kernels: (\d+) of (\d+); by area (\d+)", lines[-2])
    assert near and int(near[2]) == len(rows), lines[-2]
    for column, count in ((6, near[1]), (5, near[3])):
        inside = [0.85 <= float(row[column]) <= 1.15 for row in rows]
        edge = [abs(abs(float(row[column]) - 1) - 0.15) < 0.006 for row in rows]  # as printed
        assert abs(sum(inside) - int(count)) <= sum(edge), (column, count, inside)
    assert re.search(r"auto is within 3 percent of the fastest for \d of [0-2] masks", lines[-1]), lines[-1]
    for wrong in (["--mask", "nonsense"], ["--dtype", "f16"], ["--strategies", "spiral"], ["--machine", "rate=0"], ["--tokens", "0"], ["--ranks", "70000"]):
        out, error = run(bench, *wrong, code=2)
        assert not out and error.startswith("bench_forecast: ") and error.count("\n") == 1, (wrong, out, error)


main(*sys.argv[1:])
