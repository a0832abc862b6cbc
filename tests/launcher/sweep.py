"""dattn bench: rows, resuming after kill -9 at random moments, and what it refuses.

    sweep.py DATTN MPIRUN...
"""

import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

import jobs

USAGE, INPUT, MEMORY, OUTPUT = 2, 3, 4, 5
RANKS = 3
KILLS = 6
COMMON = ["--head-dim", "8", "--threads", "1", "--repeat", "2", "--machine",
          "latency=1e-5,bandwidth=1e9,rate=1e10"]
# 2 x 2 x 2 x 2 configurations; 3 key heads for 4 heads, and 1 byte, are what cannot be.
LISTS = ["--tokens", "65,96", "--heads", "4", "--kv-heads", "2,3", "--mask", "causal",
         "window:16,0", "--strategy", "ring", "--memory", "1", "--memory", "1T"]
# 48, half of which cannot be, and which are long enough to be killed in.
MANY = ["--tokens", "65,96", "--heads", "4", "--kv-heads", "2,3", "--mask", "causal",
        "window:16,0", "--strategy", "ring,gather,tree", "--dtype", "f4,bf16", "--warmup", "30"]


def require(good, what):
    if not good:
        raise AssertionError(what)


def rows_of(file):
    """Every line is whole."""
    text = file.read_text()
    require(text == "" or text.endswith("\n"), f"the last line is torn: {text[-80:]!r}")
    return [json.loads(line) for line in text.splitlines()]


def keys_of(file):
    return sorted(row["key"] for row in rows_of(file))


def bench(start, file, *more, ranks=RANKS, code=0, lists=LISTS):
    done = start.run(["bench", *lists, *COMMON, "--out", str(file), *more], ranks)
    require(done.returncode == code, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done


def processes_with(word):
    """The pids of ranks that have the word in their command line."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words and words[0].endswith(b"dattn"):
            found.append(int(entry.name))
    return found


def undisturbed(start, folder):
    """Rows say what was asked for and what came of it, also where nothing could."""
    file = folder / "all.jsonl"
    done = bench(start, file, "--backward", "--check")
    rows = rows_of(file)
    require(len(rows) == 16 and len(set(keys_of(file))) == 16, f"{len(rows)} rows")
    require("[16/16]" in done.stdout and "0 of them" in done.stdout, done.stdout)
    ended = [row["exit"] for row in rows]
    require(ended.count(0) == 4 and ended.count(MEMORY) == 4 and ended.count(USAGE) == 8, f"{ended}")
    for row in rows:
        require(row["ranks"] == RANKS and row["hosts"] == 1 and row["isa"], f"{row}")
        require((row["reason"] is None) == (row["exit"] == 0), f"{row}")
        if row["exit"] == MEMORY:
            require("what fits: --memory" in row["reason"], row["reason"])
        if row["exit"] != 0:
            continue
        require(row["asked"]["tokens"] in (65, 96) and row["asked"]["memory"] == 1 << 40, f"{row}")
        require(row["resolved"]["strategy"] == "ring", f"{row['resolved']}")
        require(row["memory"]["needed"]["sum"] > 0, f"{row['memory']}")
        for name in ("forward", "backward"):
            part, seconds = row[name], row[name]["seconds"]
            order = [seconds[x] for x in ("min", "p20", "median", "p80", "max")]
            require(order == sorted(order) and len(seconds["runs"]) == 2, f"{seconds}")
            require(seconds["min"] == min(seconds["runs"]) > 0, f"{seconds}")
            require(part["check"]["passed"] and part["bytes_sent_total"] > 0, f"{part}")
            require(part["forecast_seconds"] > 0 and part["phases"]["compute"]["max"] > 0, f"{part}")
    before = file.read_bytes()
    done = bench(start, file, "--backward", "--check")
    require("16 of them" in done.stdout and file.read_bytes() == before, done.stdout)
    one = ["--tokens", "65", "--heads", "4"]
    bench(start, file, lists=one)
    bench(start, file, lists=["--tokens=65,65", "--heads=4,4"])  # the same, said otherwise
    require(len(rows_of(file)) == 17, "what has a row was measured again")
    bench(start, file, lists=one, ranks=1)
    require(len(rows_of(file)) == 18, "another number of ranks is another row")
    bench(start, file, "--again", lists=one)
    keys = keys_of(file)
    require(len(keys) == 19 and len(set(keys)) == 18, "--again adds a row")


def killed(start, folder, seed):
    """Whatever is killed, whenever: in the end there are the rows of an undisturbed sweep, once."""
    calm, file = folder / "calm.jsonl", folder / "killed.jsonl"
    bench(start, calm, lists=MANY)
    dice = random.Random(seed)
    line = start.line(["bench", *MANY, *COMMON, "--out", str(file)], RANKS)
    count = lambda: file.read_bytes().count(b"\n") if file.exists() else 0
    struck = []
    for turn in range(KILLS):
        wanted = count() + 1 + dice.randrange(3)
        process = start.start(line)
        end = time.monotonic() + 60
        while count() < wanted and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.02))  # not to meet anything, but to strike at any moment
        what = ("a rank", "mpirun", "all")[turn % 3]
        ranks = processes_with(str(file))
        for pid in (ranks if what == "all" else ranks[:1] if what == "a rank" else []):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if what != "a rank":
            process.kill()
        process.communicate(timeout=60)
        struck.append((what, count()))
        if turn == 2:  # what a full disk or a dying machine leaves
            require(jobs.wait_for(lambda: not processes_with(str(file)), 60), "ranks live on")
            with open(file, "a") as end:
                end.write('{"bench":1,"key":"0123')
    bench(start, file, lists=MANY)
    require(len(keys_of(calm)) == 48 and struck[0][1] < 48, f"all is over too soon: {struck}")
    require(keys_of(file) == keys_of(calm), f"seed {seed}, {struck}: {keys_of(file)}")
    print(f"killed: seed {seed}, rows after each kill: {struck}")


def refused(start, folder):
    """Nothing is written where the sweep cannot be."""
    file = folder / "none.jsonl"
    ring = ["--tokens", "65", "--strategy"]
    for words, says in (
        ([*ring, "ring,rign"], "--strategy: 'rign' is not known, did you mean ring"),
        (["--tokens", "65,,66"], "--tokens: its value is missing"),
        (["--tokens", "--heads", "2"], "--tokens: its value is missing"),
        (["--tokens", "65", "--repeat", "2", "3"], "unexpected argument '3'"),
        (["--tokens", "65", "--heads", "2", "--kv-heads", "3,5"], "--kv-heads"),
        (["--heads", "2"], "there is no input"),
    ):
        words = [word for word in ["bench", *words, *COMMON[2:4], "--out", str(file)]]
        done = start.run(words)
        lines = [x for x in done.stderr.splitlines() if x.startswith("[rank 0] dattn")]
        require(done.returncode == USAGE and len(lines) == 1 and says in lines[0], f"{words}: {done}")
        require(not file.exists(), f"{words}: a file is there")
    notes = folder / "notes.txt"
    notes.write_text("my notes\n")
    done = bench(start, notes, ranks=2, code=INPUT)
    require("line 1 of" in done.stderr and notes.read_text() == "my notes\n", done.stderr)
    done = bench(start, folder / "missing" / "x", ranks=2, code=OUTPUT)
    require(done.stderr.count("[rank 0]") == 1, done.stderr)
    done = start.run(["bench", "--tokens", "65"])
    require(done.returncode == USAGE and "--out: is required" in done.stderr, done.stderr)
    first, other = (["bench", "--tokens", n, *COMMON, "--out", str(file)] for n in ("65", "66"))
    done = start.run_line([*start.mpirun, "-np", "1", start.dattn, *first, ":", "-np", "1",
                           start.dattn, *other])
    require(done.returncode == USAGE and "[rank 0] dattn bench: " in done.stderr, f"{done}")
    require(not file.exists(), "a file is there")


def main():
    _, start = jobs.asked(sys.argv[1:], __doc__)
    seed = int(os.environ.get("DATTN_SEED", random.randrange(1 << 30)))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        undisturbed(start, folder)
        refused(start, folder)
        killed(start, folder, seed)
    print("ok")


if __name__ == "__main__":
    main()
