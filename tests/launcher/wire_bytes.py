"""Has Open MPI itself count the bytes between ranks and compares them with the plan's figure.

    wire_bytes.py DATTN MPIRUN...

Open MPI's monitoring component counts point-to-point messages of the program (E lines: from, to,
bytes), which sees nothing of windows; collectives are counted apart, so of tree on one host only the statistics of the
backward pass must show. On several all of it does.
"""
import glob
import json
import os
import subprocess
import sys
import tempfile

SKIPPED = 77
MACHINE = "latency=1e-6,bandwidth=1e9,rate=1e10"  # given in full, so that the run measures nothing
CASES = [
    ("ring", "zigzag", "causal"),
    ("ring", "balanced", "documents:50,31,20"),
    ("gather", "striped", "window:9,0"),
    ("gather", "contiguous", "causal@0-3;window:5,0@4-5"),
    ("ulysses", "contiguous", "full"),
    ("ulysses", "zigzag", "causal", "--wire", "bf16"),
    ("usp", "zigzag", "causal"),
    ("ring", "zigzag", "causal", "--wire", "bf16"),
    ("tree", "contiguous", "causal"),
    ("tree", "contiguous", "causal", "--hosts"),
    ("ulysses", "zigzag", "causal", "--hosts"),
]
HOSTS = [0, 1, 1, 0, 2]


def problem(strategy, partition, mask, *more):
    return ["--tokens", "101", "--heads", "6", "--kv-heads", "2", "--head-dim", "16", "--value-dim",
            "12", "--mask", mask, "--strategy", strategy, "--partition", partition, "--machine",
            MACHINE, *more]


def counted(mpirun, dattn, ranks, arguments, folder):
    monitor = ["--mca", "pml_monitoring_enable", "2", "--mca", "pml_monitoring_enable_output", "3",
               "--mca", "pml_monitoring_filename", os.path.join(folder, "wire")]
    subprocess.run(mpirun + monitor + ["-np", str(ranks), dattn, "run", "--threads", "1",
                                                           "--windows", "off"] + arguments,
                   check=True, timeout=60, stdout=subprocess.DEVNULL)
    sent = [0] * ranks
    for path in glob.glob(os.path.join(folder, "wire*.prof")):
        for line in open(path, encoding="ascii"):
            words = line.split()
            if words and words[0] == "E" and words[1] != words[2]:
                sent[int(words[1])] += int(words[3])
    return sent


def main():
    # Monitoring wraps the pml; a command line that names ob1 alone would shut it out.
    dattn = sys.argv[1]
    mpirun = ["ob1,monitoring" if word == "ob1" else word for word in sys.argv[2:]]
    info = subprocess.run(["ompi_info", "--parsable"], capture_output=True, text=True, check=False)
    if "mca:pml:monitoring" not in info.stdout:
        print("skipped: this Open MPI has no monitoring component")
        return SKIPPED
    failures = 0
    for ranks in (2, 3, 5):
        for case in CASES:
            arguments = problem(*case)
            if case[-1] == "--hosts":
                arguments.append(",".join(map(str, HOSTS[:ranks])))
            plan = json.loads(subprocess.run(
                [dattn, "plan", "--ranks", str(ranks), "--backward", "--json"] + arguments,
                check=True, capture_output=True, text=True, timeout=60).stdout)
            want = [a + b for a, b in zip(plan["bytes_sent"], plan["backward"]["bytes_sent"])]
            if case[0] == "tree" and "--hosts" not in case:  # 101 tokens, 6 heads, two floats each, to all other ranks
                rows = [(r + 1) * 101 // ranks - r * 101 // ranks for r in range(ranks)]
                want = [(ranks - 1) * n * 6 * 2 * 4 for n in rows]
            with tempfile.TemporaryDirectory() as folder:
                got = counted(mpirun, dattn, ranks, arguments + ["--grad", "random"], folder)
            good = got == want
            failures += not good
            print("ok  " if good else "FAIL", ranks, *case, "plan", want, "counted", got)
    return 1 if failures else 0


sys.exit(main())
