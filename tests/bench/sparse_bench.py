"""Runs bench_sparse on small problems: the figures of a row fit together, densities are NumPy's.

    sparse_bench.py BENCH
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


def main():
    bench = sys.argv[1]
    shape = ("--tokens", str(TOKENS), "--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--repeat", "2")
    words = (bench, *shape, "--kernel", "forward,backward,decode", "--ranks", "3", "--mask", *MASKS)
    rows = [json.loads(line) for line in run(*words, "--json")[0].splitlines()]
    assert [(row["kernel"], row["mask"]) for row in rows] == [
        (kernel, mask) for kernel in ("forward", "backward", "decode") for mask in MASKS
    ]
    for row in rows:
        check(row)
    text = run(bench, *shape, "--mask", "stream")[0]
    assert "of ideal" in text and "4 ranks send" in text, text
    for wrong in (("--tokens", "0"), ("--mask", "casual"), ("--kernel", "sideways"), ("--ranks", "1e9")):
        out, err = run(bench, *wrong, code=2)
        assert len(err.splitlines()) == 1 and not out, (wrong, err)


main()
