"""Runs bench_sparse on small problems: the figures of a row fit together, densities and what caches
keep are NumPy's, and bytes are those of the formulas.

    sparse_bench.py BENCH MPIRUN...
"""

import json
import math
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "launcher"))
import oracle  # noqa: E402

MASKS = {
    "s2:block=16,local=2,stride=4,step=1": "causal",
    "stream:sink=4,recent=60": "causal",
    "neighbor:dims=16x24,window=5x7,tile=4x4": "full",
    "dilated:20,3,7": "full",
}
TOKENS, HEADS, KV_HEADS = 384, 4, 2


def run(*words, code=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def check(row):
    queries = 1 if row["kernel"] == "decode" else TOKENS
    count = lambda mask: int(oracle.allowed(mask, queries, TOKENS, HEADS, KV_HEADS).sum())
    assert row["dense"] == ("causal" if row["kernel"] == "decode" else MASKS[row["mask"]]), row
    density = count(row["mask"]) / count(row["dense"])
    assert math.isclose(row["density"], density, rel_tol=1e-9), (row, density)
    assert math.isclose(row["of_ideal"], row["speedup"] * density, rel_tol=1e-9), row
    assert row["seconds"] > 0 and row["dense_seconds"] > 0 and row["repeats"] == 2, row
    if row["kernel"] == "decode":
        assert row["bytes"] is None and row["dense_bytes"] is None, row
    else:
        assert 0 < row["bytes"] < row["dense_bytes"], row


def check_ranks(row, ranks):
    """A row of a job: all of the dense ring's bytes, and no more of the tokens kept than are seen."""
    assert row["ranks"] == ranks and row["seconds"] > 0 and row["dense_seconds"] > 0, row
    assert math.isclose(row["of_ideal"], row["speedup"] * row["density"], rel_tol=1e-9), row
    token = 2 * KV_HEADS * 64 * 4
    if row["kernel"] == "decode":
        # The last query's mask, by key head: no later query is to come.
        seen = oracle.allowed(row["mask"], 1, TOKENS, HEADS, KV_HEADS)[:, 0]
        kept = seen.reshape(KV_HEADS, -1, TOKENS).any(axis=1).sum()
        assert row["cached"] == kept * token // KV_HEADS, (row, kept)
        assert row["dense_cached"] == TOKENS * token and row["bytes"] == row["dense_bytes"] > 0, row
        return
    backward = 2 if row["kernel"] == "backward" else 1
    assert row["dense_bytes"] == backward * (ranks - 1) * TOKENS * token, row
    # mixed moves Q and O, too
    assert 0 < row["bytes"] and (row["strategy"] == "mixed" or row["bytes"] < row["dense_bytes"]), row
    assert row["area_balance"] >= 1 and row["kernel_balance"] >= 1, row


def on_ranks(bench, mpirun, shape):
    start = (*mpirun, "-np", "3", bench, *shape)
    words = ("--kernel", "forward,backward,decode", "--strategies", "ring,mixed")
    masks = ("stream:sink=4,recent=60", "causal@0-1;window:5,0@2-3")
    rows = [json.loads(line) for line in run(*start, *words, "--mask", *masks, "--json")[0].splitlines()]
    assert [(row["kernel"], row["strategy"]) for row in rows] == [
        *[(kernel, strategy) for kernel in ("forward", "backward") for _ in masks for strategy in ("ring", "mixed")],
        *[("decode", "sequence") for _ in masks],
    ], rows
    for row in rows:
        refused = row["strategy"] == "mixed" and row["mask"] == masks[0]
        assert ("refused" in row) == refused, row
        if not refused:
            check_ranks(row, 3)
    out, err = run(*start, "--ranks", "4", code=2)
    assert "--ranks" in err and not out, (out, err)


def main():
    bench, *mpirun = sys.argv[1:]
    shape = ("--tokens", str(TOKENS), "--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--repeat", "2")
    words = (bench, *shape, "--kernel", "forward,backward,decode", "--ranks", "3", "--mask", *MASKS)
    rows = [json.loads(line) for line in run(*words, "--json")[0].splitlines()]
    assert [(row["kernel"], row["mask"]) for row in rows] == [
        (kernel, mask) for kernel in ("forward", "backward", "decode") for mask in MASKS
    ]
    for row in rows:
        check(row)
    on_ranks(bench, mpirun, shape)
    text = run(bench, *shape, "--mask", "stream")[0]
    assert "of ideal" in text and "4 ranks send" in text, text
    for wrong in (("--tokens", "0"), ("--mask", "casual"), ("--kernel", "sideways"), ("--ranks", "1e9")):
        out, err = run(bench, *wrong, code=2)
        assert len(err.splitlines()) == 1 and wrong[0] in err and not out, (wrong, err)


main()
