"""Runs bench_overlap on tiny problems, plain and over the links of bench/shaped, and reads what it
writes.

    overlap_bench.py plain BENCH MPIRUN...
    overlap_bench.py hosts|lo BENCH SHAPED     (77, skipped, where this machine has no such link)
"""

import csv
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

SKIPPED = 77
TINY = "--tokens-per-rank 24,33 --heads 6 --kv-heads 3 --head-dim 8 --mask causal --pass both --repeat 3"


def run(line, codes=(0,)):
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in codes, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def check(folder, rate):
    """Figures that fit together, polling and not, for both problems."""
    report = json.loads((folder / "r.json").read_text())
    rows = report["rows"]
    lines = list(csv.DictReader((folder / "r.csv").read_text().splitlines()))
    assert [row["pass"] for row in rows] == [line["pass"] for line in lines]
    assert report["bench"] == "overlap" and report["comm_over_compute"] == 0.5
    ran = [row for row in rows if row["refused"] is None]
    ring = [row for row in ran if row["strategy"] == "ring"]
    assert [(row["tokens"], row["pass"], row["polling"]) for row in ring] == [
        (tokens, which, polling)
        for tokens in (48, 66)
        for which in ("forward", "backward")
        for polling in (True, False)]
    # A strategy has rows of both passes, or a refusal that says which it lacks.
    for strategy in {row["strategy"] for row in rows}:
        mine = [row for row in rows if row["strategy"] == strategy]
        assert {row["pass"] for row in mine} == {"forward", "backward"}, mine
        assert all(row["refused"] is None or row["both_seconds"] is None for row in mine), mine
    for row in ran:
        assert row["bytes_per_rank"] > 0 and row["messages"] > 0 and row["repeats"] >= 3, row
        assert row["hidden_min"] <= row["hidden"] <= row["hidden_max"], row
        assert (row["link_bytes_per_second"] is not None) == rate, row
        assert 0 <= row["hidden_plannable"] <= 1 + 1e-6, row
        assert row["compute_seconds"] > 0 and row["comm_seconds"] > 0 and row["both_seconds"] > 0, row
    # K and V of 24 tokens and 3 heads go to the other rank.
    assert ring[0]["bytes_per_rank"] == 2 * 24 * 3 * 8 * 4, ring[0]


def namespaces():
    """Those of bench/shaped; runs that were killed, or go on elsewhere, may have some, too."""
    if shutil.which("ip") is None:
        return set()
    return set(re.findall(r"^dattn\d+n\w+", run(["ip", "netns", "list"]).stdout, re.M))


def main():
    way, bench, *start = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        words = f"{TINY} --comm-over-compute 0.5 --json {folder}/r.json --csv {folder}/r.csv".split()
        if way != "plain":
            before = namespaces()
            done = run([*start, "--link", way, "--ranks", "2", bench, *words], (0, SKIPPED))
            if done.returncode == SKIPPED:
                assert re.fullmatch(r"shaped: .+\n", done.stderr), done.stderr
                print("skipped:", done.stderr, end="")
                return SKIPPED
            check(folder, rate=True)
            left = namespaces() - before
            assert not left, f"namespaces are left: {left}"
        else:
            run([*start, "-np", "2", bench, *words])
            check(folder, rate=False)
            for ranks, more, says in ((1, "", "two or more"),
                                      (2, "--tokens 9", "--tokens-per-rank"),
                                      (2, "--piece 0", "--piece"),
                                      (2, "--comm-over-compute 0", "--comm-over-compute"),
                                      (2, "--set-rate false", "--set-rate: 'false")):
                line = [*start, "-np", str(ranks), bench, *TINY.split(), *more.split()]
                done = run(line, (2,))
                assert re.search(r"^\[rank 0\] bench_overlap: .*" + says, done.stderr, re.M), done.stderr
    print(f"bench_overlap, {way}: all good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
