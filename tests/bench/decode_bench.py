"""Runs bench_decode on a small cache: rows fit together, and bytes are those of the cache.

    decode_bench.py BENCH MPIRUN...
"""

import json
import math
import subprocess
import sys

CONTEXT, BATCH, NEW, HEADS, KV, DIM = 63, 3, 2, 6, 2, 32


def run(*words, code=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def check(row, ranks, form, element):
    assert (row["ranks"], row["form"]) == (ranks, form) and row["refused"] is None, row
    assert row["kv_bytes"] == 2 * BATCH * (CONTEXT + NEW) * KV * DIM * element, row
    assert 0 < row["compute_seconds"] <= row["seconds"] and 0 <= row["wait_seconds"] <= row["seconds"], row
    assert len(row["rank_seconds"]) == len(row["rank_read_gbps"]) == ranks and row["of_read"] > 0, row
    assert math.isclose(row["gbps"], row["kv_bytes"] / row["seconds"] / 1e9, rel_tol=1e-9), row
    assert row["of_read_slowest"] >= row["of_read"] * 0.999, row
    # One collective a step, or one exchange with each other rank, or nothing at all.
    one = ranks == 1 or form == "heads"
    assert row["messages"] == (0 if one else ranks * (ranks - 1) if form == "helix" else ranks), row
    assert row["collectives_rank"] == (1 if form == "tree" and ranks > 1 else 0), row


def main():
    bench, mpirun = sys.argv[1], sys.argv[2:]
    job = (*mpirun, "-np", "2", bench)
    small = ["--context", str(CONTEXT), "--batch", str(BATCH), "--new", str(NEW), "--heads", str(HEADS)]
    small += ["--kv-heads", str(KV), "--head-dim", str(DIM), "--read", "8M", "--steps", "1"]
    forms = ("tree", "heads")
    for dtype, element in (("bf16", 2), ("f4", 4)):
        rows = json.loads(run(*job, *small, "--dtype", dtype, "--ranks", "1,2", "--forms", ",".join(forms), "--repeat", "2", "--json", "-")[0])
        assert len(rows) == 2 * len(forms), rows
        for i, row in enumerate(rows):
            check(row, 1 + i // len(forms), forms[i % len(forms)], element)
    rows = json.loads(run(*job, *small, "--forms", "tree", "--by-speed", "--repeat", "1", "--json", "-")[0])
    assert len(rows) == 2 and rows[0]["rank_speeds"] == "1", rows
    for row in rows:
        check(row, 2, "tree", 2)
    text = run(*job, *small, "--repeat", "1")[0]
    assert text.count(" tree ") == 1 and text.count(" helix ") == 1 and "of it" in text, text
    head, *rows = [line for line in text.splitlines() if line and not line.startswith("#")]
    for row in rows:  # numbers end where their heading ends
        for name in ("ms", "GB/s", "can read", "of it", "of slowest"):
            end = head.index(name) + len(name)
            assert row[end - 1].isdigit() and row[end] == " ", text
    for wrong, complaint in ((("--ranks", "3"), "--ranks: 3 ranks"), (("--forms", "ring"), "--forms"), (("--heads", "3"), "heads")):
        out, err = run(*job, *small, *wrong, code=2)
        assert complaint in err and not out, (wrong, out, err)


main()
