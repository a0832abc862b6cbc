"""What a job needs against what there is: refusals, their tables and remedies, and what jobs take.

    memory.py DATTN MPIRUN...

A remedy that a refusal names is taken, and must run.
"""

import json
import os
import pathlib
import re
import sys

import jobs

MEMORY = 4
RANKS = 4
MACHINE = ["--machine", "latency=1e-5,bandwidth=1e9,rate=1e10,overhead=1e-6"]
PROBLEM = ["--tokens", "8K", "--heads", "4", "--head-dim", "128", "--mask", "causal", *MACHINE]
DEEP = [*PROBLEM, "--strategy", "ring", "--partition", "contiguous", "--prefetch", "3"]


def require(good, what):
    if not good:
        raise AssertionError(what)


def report_of(start, words, ranks, **more):
    done = start.run(["run", *words, "--threads", "1", "--json"], ranks, **more)
    require(done.returncode == 0, f"{words}: exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


def needs_of(start, words, ranks):
    """What the rank that needs most needs, as `dattn plan` says."""
    done = start.run(["plan", *words, "--ranks", str(ranks), "--needs", "--json"])
    require(done.returncode == 0, done.stderr)
    return max(row["sum"] for row in json.loads(done.stdout)["memory"]["by_rank"])


def remedies_of(done):
    """The remedies that a refusal names, each as (words to replace by name, ranks or None)."""
    require(done.returncode == MEMORY, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    lines = [line for line in done.stderr.splitlines() if line.startswith("[rank ")]
    require(len(lines) == 1, done.stderr)
    require("# memory  rank " in done.stderr and "TOO LITTLE" in done.stderr, done.stderr)
    said = re.search(r"what fits: (.*)", lines[0])
    require(said, f"no remedy: {lines[0]}")
    return said[1].split("; or ")


def with_remedy(words, remedy):
    """The words with what the remedy says, and the number of ranks if it names one."""
    words, ranks = list(words), None
    for part in remedy.split(", "):
        if found := re.fullmatch(r"(\d+) ranks on 1 hosts?", part):
            ranks = int(found[1])
            continue
        for name in re.findall(r"--[a-z-]+", part):
            if name in words:
                at = words.index(name)
                has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
                del words[at : at + 1 + has_value]
        if not part.startswith("no "):
            words += [word for word in part.split() if word not in ("no", "--mesh")]
    return words, ranks


def takes_no_more_than_it_needs(start):
    """What ranks had at most, against what their plans say; large enough for slots to count."""
    for words in (
        [*PROBLEM, "--strategy", "gather", "--partition", "contiguous"],
        [*PROBLEM, "--strategy", "ulysses", "--dtype", "bf16", "--grad", "random"],
    ):
        memory = report_of(start, words, 2)["memory"]
        for row, took in zip(memory["by_rank"], memory["took"]):
            share = took / row["sum"]
            require(0.6 < share <= 1, f"{words}: a rank took {took} of {row}")


def memory_option(start):
    """--memory below what the plan needs: all that is named runs."""
    need, less = needs_of(start, DEEP, RANKS), needs_of(start, [*DEEP[:-1], "1"], RANKS)
    require(less < need, f"{need} bytes with 3 stages ahead, {less} with one")
    words = [*DEEP, "--memory", str((need + less) // 2)]
    remedies = remedies_of(start.run(["run", *words, "--threads", "1"], RANKS))
    require("--prefetch 1" in remedies and remedies[0].startswith("--memory "), f"{remedies}")
    for remedy in remedies:
        changed, ranks = with_remedy(words, remedy)
        report_of(start, changed, ranks or RANKS)
    # The last byte decides.
    report_of(start, [*DEEP, "--memory", str(need)], RANKS)
    remedies_of(start.run(["run", *DEEP, "--memory", str(need - 1), "--threads", "1"], RANKS))
    remedies_of(start.run(["plan", *DEEP, "--memory", str(need - 1), "--ranks", str(RANKS)]))


def address_space(start):
    """RLIMIT_AS: what is there already counts."""
    large = 1 << 33

    def limited(bytes_):
        """A Starter whose ranks have so much address space."""
        script = f'ulimit -v {bytes_ // 1024}; exec "$@"'
        other = jobs.Starter(start.dattn, start.mpirun)
        other.line = lambda words, ranks: [*start.mpirun, "-np", str(ranks), "sh", "-c", script,
                                           "sh", start.dattn, *words]
        return other

    tiny = report_of(limited(large), ["--tokens", "64", *MACHINE], RANKS)
    there = [x["there"] for x in tiny["memory"]["limits"] if x["name"] == "RLIMIT_AS"]
    require(len(there) == RANKS, f"{tiny['memory']}")
    need, less = needs_of(start, DEEP, RANKS), needs_of(start, [*DEEP[:-1], "1"], RANKS)
    tight = limited(large - min(there) + (need + less) // 2)
    done = tight.run(["run", *DEEP, "--threads", "1"], RANKS)
    remedies = remedies_of(done)
    require("RLIMIT_AS" in done.stderr, done.stderr)
    changed, ranks = with_remedy(DEEP, remedies[0])
    report_of(tight, changed, ranks or RANKS)


def cgroup(start):
    """A memory cgroup of the job's own; why not, where there can be none."""
    base = next((pathlib.Path(at) for at in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")
                 if (pathlib.Path(at) / "cgroup.procs").exists()), None)
    if base is None:
        return "there are no memory cgroups"
    group = base / f"dattn_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return f"no cgroup can be made: {error}"
    try:
        need, less = needs_of(start, DEEP, RANKS), needs_of(start, [*DEEP[:-1], "1"], RANKS)
        limit = next((group / name for name in ("memory.limit_in_bytes", "memory.max")
                      if (group / name).exists()), None)
        if limit is None:
            return f"{group} has no memory controller"

        def inside(bytes_):
            limit.write_text(str(bytes_))
            other = jobs.Starter(start.dattn, start.mpirun)
            script = f'echo $$ > {group}/cgroup.procs; exec "$@"'
            other.line = lambda words, ranks: ["sh", "-c", script, "sh", *start.mpirun, "-np",
                                               str(ranks), start.dattn, *words]
            return other

        tiny = report_of(inside(1 << 33), ["--tokens", "64", *MACHINE], RANKS)
        there = [x["there"] for x in tiny["memory"]["limits"] if x["name"] == str(limit)]
        require(len(there) == 1, f"{tiny['memory']}")
        used = (1 << 33) - there[0]
        tight = inside(used + RANKS * (need + less) // 2)
        done = tight.run(["run", *DEEP, "--threads", "1"], RANKS)
        remedies = remedies_of(done)
        require(str(limit) in done.stderr, done.stderr)
        changed, ranks = with_remedy(DEEP, remedies[0])
        report_of(tight, changed, ranks or RANKS)
    except PermissionError as error:
        return f"the cgroup cannot be used: {error}"
    finally:
        try:
            group.rmdir()
        except OSError:
            pass  # the last process of a killed job may still be in it
    return None


def small_shm(start):
    """/dev/shm without room: a note that names it."""
    line = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=3m none /dev/shm && exec "$@"',
            "sh", *[word.replace("vader,self", "vader,tcp,self") for word in start.mpirun], "-np", "2",
            start.dattn, "run", "--tokens", "64", *MACHINE, "--threads", "1"]
    done = start.run_line(line)
    if re.search("unshare|mount", done.stderr) and "NOTE" not in done.stderr:
        return f"no file system can be mounted: {done.stderr.strip()[:80]}"
    require("# NOTE: /dev/shm has 3145728 bytes left" in done.stderr, done.stdout + done.stderr)
    return None


def main():
    _, start = jobs.asked(sys.argv[1:], __doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = 0
    for case in (takes_no_more_than_it_needs, memory_option, address_space, cgroup, small_shm):
        try:
            skipped = case(start)
            print(f"{case.__name__}: {'skipped: ' + skipped if skipped else 'ok'}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{case.__name__}: FAILED: {error}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
