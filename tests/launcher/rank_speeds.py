"""Ranks that are not equally fast: --rank-speeds of run, plan, bench and decode.

    rank_speeds.py DATTN MPIRUN...
"""

import json
import pathlib
import re
import sys
import tempfile

import jobs
from jobs import Failed, ran, want

PROBLEM = "--tokens 601 --heads 8 --kv-heads 4 --head-dim 16 --mask causal".split()
# Nothing is measured that the test does not ask for.
MACHINE = ["--machine", "latency=1e-6,bandwidth=1e10,rate=1e10"]
RUN = ["run", *PROBLEM, *MACHINE, "--threads", "1"]


def refused(starter, words, says, ranks=0):
    line = jobs.refused(starter, words, 2, says, ranks)
    want("--rank-speeds" in line, f"{words}: {line}")


def over_ideal(report, speeds):
    """What the rank that computes longest takes, over what all would if all were done at once."""
    pairs = report["pairs"]
    return max(p / s for p, s in zip(pairs, speeds)) * sum(speeds) / sum(pairs)


def strategies(starter):
    for strategy, bound in [("ring", 1.04), ("gather", 1.04), ("lightseq", 1.04), ("ulysses", 1.15)]:
        done = ran(starter, [*RUN, "--rank-speeds", "1,0.5,0.75", "--strategy", strategy, "--grad", "random",
                             "--check", "--json", "-"], 3)
        report = json.loads(done.stdout)
        want(report["rank_speeds"] == [1, 0.5, 0.75], str(report["rank_speeds"]))
        want(report["check"]["passed"] and report["backward"]["check"]["passed"], f"{strategy}: check")
        want(report["bytes_sent"] == report["planned_bytes_sent"], f"{strategy}: sent other than planned")
        for one in [report, report["backward"]]:
            share = over_ideal(one, report["rank_speeds"])
            want(share < bound, f"{strategy}, {report['partition']}: {share} of what fits the speeds")


def plans(starter):
    plan = ["plan", *PROBLEM, *MACHINE, "--ranks", "4", "--strategy", "ring", "--backward", "--json", "-"]
    report = json.loads(ran(starter, [*plan, "--rank-speeds", "3x1,0.5"]).stdout)
    want(report["partition"] == "balanced" and report["rank_speeds"] == [1, 1, 1, 0.5], str(report))
    want(over_ideal(report, report["rank_speeds"]) < 1.03, str(report["pairs"]))
    seconds = report["forecast"]["compute_seconds"]
    want(max(seconds) < 1.05 * min(seconds), f"compute seconds by rank: {seconds}")
    text = ran(starter, [*plan[:-2], "--rank-speeds", "3x1,0.5"]).stdout
    want("speed" in text and "of what fits its speed" in text, text)
    # Equal ones change nothing.
    none = ran(starter, plan).stdout
    want(none == ran(starter, [*plan, "--rank-speeds", "4x0.3"]).stdout, "equal speeds change the plan")
    want("rank_speeds" not in none, none)


def bad_words(starter):
    plan = ["plan", *PROBLEM, "--ranks", "3", "--rank-speeds"]
    for words, says in [
        ("1,1", "speeds of 2 ranks, but there are 3"),
        ("1,1,1,1", "more ranks than there are, 3"),
        ("1,0,1", "'0' in"),
        ("1,-1,1", "'-1' in"),
        ("1,nan,1", "'nan' in"),
        ("1,fast,1", "'fast' in"),
        ("3x", "'3x' in"),
        ("1,1,0.0001", "less than 1/1024 of the fastest"),
        ("measured", "nothing is measured here"),
    ]:
        refused(starter, [*plan, words], says)
    refused(starter, [*RUN, "--rank-speeds", "1,2,3"], "more ranks than there are, 2", 2)


def measured(starter, folder):
    """The list that is printed makes the same plan, and the same bits."""

    def bits(name, *words):
        out, grad = folder / f"{name}.npy", folder / f"{name}_dk.npy"
        done = ran(starter, [*RUN, *words, "--strategy", "ring", "--partition", "balanced", "--grad", "random",
                             "--out", str(out), "--dk", str(grad)], 2)
        return out.read_bytes() + grad.read_bytes(), done.stdout

    first, text = bits("first", "--rank-speeds", "measured")
    line = re.search(r"speeds of ranks: (equal|(\S+)), measured(?:; the same plan again: --rank-speeds (\S+))?\n", text)
    want(line is not None, text)
    again, same = bits("again", *(["--rank-speeds", line[3]] if line[3] else []))
    want(again == first, f"other bits than measured, with {line[0]}")
    plan = lambda text: re.findall(r"^(?:backward )?plan: .*", text, re.M)
    want(plan(same) == plan(text) and len(plan(text)) == 2, f"{text}\n{same}")
    uneven, text = bits("uneven", "--rank-speeds", "1,0.25")
    want("speeds of ranks: 1,0.25\n" in text, text)
    want(uneven != first, "the plan of a slow rank is that of equal ones")


def sweep(starter, folder):
    rows = folder / "rows.jsonl"
    words = ["bench", *PROBLEM, *MACHINE, "--threads", "1", "--repeat", "1", "--warmup", "0", "--strategy", "ring",
             "--rank-speeds", "1,0.5", "2x1", "--out", str(rows)]
    ran(starter, words, 2)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    want([row["exit"] for row in found] == [0, 0], str(found))
    want([row["asked"]["rank_speeds"] for row in found] == ["1,0.5", "2x1"], str(found))
    want(found[0]["resolved"]["rank_speeds"] == [1, 0.5], str(found[0]["resolved"]))
    want("rank_speeds" not in found[1]["resolved"], str(found[1]["resolved"]))


def decode(starter, folder):
    """Ranks keep tokens in proportion; heads that lie on several ranks go by the slowest of them."""
    words = ["decode", "--heads", "6", "--kv-heads", "2", "--head-dim", "16", "--context", "301", "--batch", "2",
             "--steps", "2", "--warmup", "0", "--check", "--json", "-"]
    tokens = 2 * 303
    for speeds, ranks, more, share in [
        ("1,0.5,0.25", 3, ["--form", "tree"], 4 / 7),
        ("1,0.5,0.25", 3, ["--form", "helix", "--dtype", "bf16", "--new", "2"], 4 / 7),
        ("1,0.5,0.25", 3, ["--form", "sequence", "--prefix-tree", "levels=1x50"], 4 / 7),
        ("0.5,1,1,0.25", 4, ["--form", "tree", "--mesh", "2x2"], 2 / 3 / 2),  # rows of ranks: 0.5 and 0.25
        ("1,0.5,0.25", 3, ["--form", "tree", "--mask", "stream:sink=4,recent=64"], None),
        ("1,0.5", 2, ["--form", "heads"], 1 / 2),  # no token is anybody's own
    ]:
        done = ran(starter, [*words, "--rank-speeds", speeds, *more], ranks)
        report = json.loads(done.stdout)
        want(report["check"]["passed"], f"{more}: {report['check']}")
        want(report["rank_speeds"] == [float(s) for s in speeds.split(",")], str(report["rank_speeds"]))
        if share:
            got = report["kv_bytes_rank"] / report["kv_bytes"]
            want(abs(got - share) < 8 / tokens, f"{more}: a rank keeps {got} of the cache, not {share}")
    even = json.loads(ran(starter, [*words, "--form", "tree", "--rank-speeds", "3x0.2"], 3).stdout)
    want("rank_speeds" not in even and even["kv_bytes_rank"] * 3 == even["kv_bytes"], str(even))
    latent = ["decode", "--model", "deepseek-v2-lite", "--context", "9", "--steps", "1"]
    refused(starter, [*latent, "--rank-speeds", "1,0.5"], "is of GQA", 2)
    refused(starter, [*words, "--rank-speeds", "1,2,3"], "more ranks than there are, 2", 2)

    def bits(name, speeds):
        out = folder / f"{name}.npy"
        done = ran(starter, [*words[:-2], "--form", "tree", "--out", str(out), "--rank-speeds", speeds], 2)
        return out.read_bytes(), done.stdout

    first, text = bits("measured", "measured")
    line = re.search(r"speeds of ranks: (equal|(\S+)), measured(?:; the same plan again: --rank-speeds (\S+))?\n", text)
    want(line is not None, text)
    again, _ = bits("listed", line[3] or "2x1")
    want(again == first, f"other bits than measured, with {line[0]}")


def main():
    _, starter = jobs.asked(sys.argv[1:], __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            plans(starter)
            bad_words(starter)
            strategies(starter)
            measured(starter, folder)
            decode(starter, folder)
            sweep(starter, folder)
        except Failed as failed:
            sys.exit(f"FAILED: {failed}")
    print("all as they should be")


main()
