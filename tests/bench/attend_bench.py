"""Runs bench_attend on small problems: the figures of a row fit together, work is what NumPy counts.

    attend_bench.py BENCH
"""

import json
import math
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "launcher"))
import oracle  # noqa: E402

TOKENS, HEADS, KV_HEADS, DIM = 192, 4, 2, 32
SHAPE = ("--tokens", str(TOKENS), "--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--head-dim", str(DIM))
ONCE = ("--repeat", "2", "--seconds", "1")
# Of a pair and head, in numbers of a head: Q K and P V; the same again, dP, dQ and dK.
PRODUCTS = {"forward": 2, "backward": 5}


def run(*words, text="", code=0):
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def rows_of(*words):
    return [json.loads(line) for line in run(*words, "--json")[0].splitlines()]


def work_of(kernel, mask, dtype):
    """Operations; of decode bytes."""
    if kernel == "decode":
        return 2 * TOKENS * KV_HEADS * DIM * (2 if dtype == "bf16" else 4)
    pairs = int(oracle.allowed(mask, TOKENS, TOKENS, HEADS, KV_HEADS).sum())
    return 2 * PRODUCTS[kernel] * pairs * DIM


def check_rows(bench, kernels, dtypes, masks):
    rows = rows_of(bench, *SHAPE, *ONCE, "--kernel", ",".join(kernels), "--dtype", ",".join(dtypes), "--mask", *masks)
    named = [(row["kernel"], row["dtype"], row["mask"]) for row in rows]
    assert named == [(kernel, dtype, mask) for kernel in kernels for dtype in dtypes for mask in masks], named
    for row in rows:
        decode = row["kernel"] == "decode"
        work = work_of(row["kernel"], row["mask"], row["dtype"])
        assert math.isclose(row["gbps" if decode else "gflops"] * 1e9 * row["seconds"], work, rel_tol=1e-6), (row, work)
        assert row["repeats"] > 0 and row["threads"] == 1 and row["tokens"] == TOKENS, row
        for name in ("sgemm", "amx", "read"):
            if row[f"ratio_{name}"] is not None:
                assert row[f"ratio_{name}_min"] <= row[f"ratio_{name}"] <= row[f"ratio_{name}_max"], row
                assert row[f"anchor_{name}"] > 0, row
        assert (row["ratio_read"] is not None) == decode, row


def check_service(bench):
    """What bench/peers talks to."""
    ask = {"kernel": "forward", "mask": "causal", "d": DIM, "heads": HEADS, "kv_heads": KV_HEADS, "tokens": TOKENS}
    lines = [json.dumps(ask), json.dumps({"kernel": "read"}), "{", json.dumps({**ask, "mask": "casual"})]
    answers = [json.loads(line) for line in run(bench, "--serve", text="\n".join(lines))[0].splitlines()]
    assert len(answers) == len(lines), answers
    assert answers[0]["work"] == work_of("forward", "causal", "f32") and answers[0]["seconds"] > 0, answers[0]
    assert answers[1]["rate"] > 0 and all("error" in answer for answer in answers[2:]), answers


def main():
    bench = sys.argv[1]
    check_rows(bench, ("forward", "backward"), ("f32", "bf16"), ("full", "window:20,0"))
    check_rows(bench, ("decode",), ("bf16",), ("full",))
    [row] = rows_of(bench, *SHAPE, *ONCE, "--mask", "causal", "--against-full")
    assert row["ratio_full"] > 0 and row["ratio_sgemm"] is None, row
    check_service(bench)
    for wrong in (("--tokens", "0"), ("--mask", "casual"), ("--kernel", "sideways"), ("--isa", "mmx"), ("--threads", "none")):
        out, err = run(bench, *wrong, code=2)
        assert len(err.splitlines()) == 1, (wrong, out, err)


main()
