"""Runs bench_forms on a small layer: rows fit together, and what is allowed follows from the ceilings.

    forms_bench.py BENCH MPIRUN...
"""

import json
import math
import subprocess
import sys

FORMS = ("heads", "sequence", "exact", "helix", "tpla")
# deepseek-v2-lite: numbers of a token, heads, rank and part with position of the latent, of queries and values
MODEL, HEADS, RANK, ROPE, NOPE, VALUE = 2048, 16, 512, 64, 128, 128
CONTEXT, BATCH, NEW = 63, 2, 1


def run(*words, code=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def close(a, b):
    assert math.isclose(a, b, rel_tol=1e-9), (a, b)


def cost(form, ranks, slices, element, weight):
    """FLOPs and bytes of attention, then of the weights, of the rank with most: counted by hand."""
    keys = BATCH * (CONTEXT + NEW)
    heads, latent, own = HEADS, RANK // slices, HEADS // ranks
    if form == "heads":
        heads = own
    elif form in ("exact", "tpla"):
        heads = HEADS // (ranks // slices)
    else:
        keys //= ranks
    asked = HEADS if form == "helix" else own  # heads whose queries this rank makes
    absorbed = heads if form in ("exact", "tpla") else asked
    valued = heads if form in ("exact", "tpla") else own
    weights = (
        MODEL * (RANK + ROPE) // ranks
        + asked * MODEL * (NOPE + ROPE)
        + (absorbed * NOPE + valued * VALUE) * latent
        + own * VALUE * MODEL
    )
    flops = 2 * keys * heads * (2 * latent + ROPE) * NEW
    return flops, keys * (latent + ROPE) * element, 2 * weights * BATCH * NEW, weights * weight


def check(row, heads, dtype):
    form = row["form"].removeprefix("latent-")
    assert row["slices"] == {"exact": row["ranks"], "tpla": 2}.get(form, 1), row
    if form == "tpla" and row["ranks"] == 1:
        assert "do not divide 1" in row["refused"] and "seconds" not in row, row
        return
    assert row["refused"] is None and row["approximate"] == (form == "tpla"), row
    element = 2 if dtype == "bf16" else 4
    want = cost(form, row["ranks"], row["slices"], element, element)
    names = ("attention_flops", "attention_bytes", "weights_flops", "weights_bytes")
    assert tuple(row[name] for name in names) == want, (row, want)
    if row["repeats"] == 1:  # else these are medians, which need not fit together
        tiles = row["bf16_gflops_rank"] if dtype == "bf16" and row["bf16_by"] else row["sgemm_gflops_rank"]
        bytes_per_second = row["read_gbps_rank"] * 1e9
        allowed = max(want[0] / tiles / 1e9, want[1] / bytes_per_second)
        allowed += max(want[2] / row["sgemm_gflops_rank"] / 1e9, want[3] / bytes_per_second)
        close(row["allowed_seconds"], allowed)
        close(row["of_allowed"], allowed / row["seconds"])
        close(row["heads_over_form"], heads["seconds"] / row["seconds"])
        close(row["heads_over_form_allowed"], heads["allowed_seconds"] / allowed)
        close(row["ratio_of_allowed"], row["heads_over_form"] / row["heads_over_form_allowed"])
    phases = [row[f"{name}_seconds"] for name in ("project", "attention", "wait", "reduce")]
    assert all(0 <= phase <= row["seconds"] for phase in phases), row


def main():
    bench, mpirun = sys.argv[1], sys.argv[2:]
    job = (*mpirun, "-np", "2", bench)
    small = ("--model", "deepseek-v2-lite", "--context", str(CONTEXT), "--batch", str(BATCH), "--read", "8M", "--steps", "1")
    for dtype in ("bf16", "f4"):
        types = ("--dtype", dtype, "--weights-dtype", dtype)
        ranks = "1,2" if dtype == "bf16" else "2"
        rows = json.loads(run(*job, *small, *types, "--ranks", ranks, "--repeat", "1", "--json", "-")[0])
        assert [row["form"] for row in rows] == [f"latent-{form}" for form in FORMS] * (len(rows) // len(FORMS)), rows
        for i, row in enumerate(rows):
            check(row, rows[i // len(FORMS) * len(FORMS)], dtype)
    text = run(*job, *small, "--forms", "sequence,tpla", "--repeat", "2")[0]
    assert text.count("latent-") == 2 and "APPROXIMATE" in text and "2 ranks" in text, text
    for wrong, complaint in ((("--ranks", "3"), "--ranks: 3 ranks"), (("--forms", "ring"), "--forms"), (("--ranks", "0"), "--ranks")):
        out, err = run(*job, *small, *wrong, code=2)
        assert complaint in err and not out, (wrong, out, err)


main()
