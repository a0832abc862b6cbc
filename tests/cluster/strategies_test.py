"""Every strategy, forward and backward, on 2 hosts x 2 ranks and 4 hosts x 1 under 1 Gbit/s and
100 us: the check passes, and O, LSE, dQ, dK, dV are those of 4 ranks on one host, bit for bit;
those of one host that pretends to be as many where the plan adds up by host. And decoding by the
form that all-reduces most finds its hosts and gives the bits of one that pretends.

    strategies_test.py [--only STRATEGY] DATTN
"""

import pathlib
import subprocess
import sys
import tempfile

import cluster

RANKS = 4
OUTPUTS = {"--out": "o.npy", "--lse": "lse.npy", "--dq": "dq.npy", "--dk": "dk.npy", "--dv": "dv.npy"}
BY_HOST = {2: {"gather", "lightseq", "mixed", "tree", "ulysses"}, 4: {"tree"}}  # what adds up by host, on so many
# Nothing divides the tokens. Heads differ so that mixed takes them; what is measured may not decide.
PROBLEM = ("run --tokens 331 --heads 8 --kv-heads 4 --head-dim 24 --value-dim 16 --grad random "
           "--mask causal@0-3;window:40,0@4-7 --partition zigzag --prefetch 1 --threads 1 --watchdog 60").split()


def strategies(dattn):
    """Names and requirements, as the command lists them."""
    text = subprocess.run([dattn, "list"], capture_output=True, text=True, check=True).stdout
    lines = text.split("\n\n")[0].splitlines()[1:]
    names = [line.split()[0] for line in lines[::2]]
    needs = [line.removeprefix(" " * 23 + "requires ") for line in lines[1::2]]
    assert len(names) == len(needs) >= 9 and not any(need.startswith(" ") for need in needs), text
    return {name: need for name, need in zip(names, needs) if need != "one rank"}


def run(hosts, dattn, strategy, need, folder, check, pretended=None):
    """Runs on `hosts`; None, or what went wrong. `pretended`: words of --hosts."""
    folder.mkdir(parents=True)
    line = ["mpirun", "-H", hosts.slots(RANKS // len(hosts.names)), "-np", str(RANKS), "--mca", "mpi_yield_when_idle", "1"]
    line += [dattn, *PROBLEM, "--strategy", strategy]
    line += ["--mesh", "2x2"] if "mesh of two axes" in need else []
    line += ["--hosts", pretended] if pretended else []
    for option, name in OUTPUTS.items():
        line += [option, str(folder / name)]
    done = hosts.call("host0", line + (["--check"] if check else []))
    if done.returncode != 0:
        return f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    if check and done.stdout.count("PASSED") != 2:
        return f"O and gradients did not both pass: {done.stdout}"
    seen = {line.split()[2] for line in done.stdout.splitlines() if line.startswith("# ") and " host" in line and line.split()[1].isdigit()}
    if seen != set(hosts.names):
        return f"ranks were on {seen}"
    return None


def decode(hosts, dattn, out, pretended=None):
    """Runs `decode` on `hosts`; None, or what went wrong."""
    words = "decode --form tree --hidden 64 --heads 4 --q-rank 0 --kv-rank 32 --nope-dim 8 --rope-dim 8 --v-dim 8"
    line = ["mpirun", "-H", hosts.slots(RANKS // len(hosts.names)), "-np", str(RANKS), "--mca", "mpi_yield_when_idle", "1"]
    line += [dattn, *words.split(), *"--context 100,7 --steps 2 --threads 1 --watchdog 60 --check --out".split(), str(out)]
    done = hosts.call("host0", line + (["--hosts", pretended] if pretended else []))
    if done.returncode != 0 or "PASSED" not in done.stdout or "hosts: 2x2;" not in done.stdout:
        return f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    return None


def main(arguments):
    only = ""
    if arguments[:1] == ["--only"]:
        only, arguments = arguments[1], arguments[2:]
    if len(arguments) != 1:
        sys.exit(__doc__)
    dattn = arguments[0]
    cluster.contain()
    failures = 0
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        scratch = pathlib.Path(scratch).resolve()
        listed = {name: need for name, need in strategies(dattn).items() if only in (name, "")}
        with cluster.Cluster(1, mbit=1000, delay_us=100) as hosts:
            for count, by_host in BY_HOST.items():
                for strategy in listed.keys() & by_host:
                    pretended = f"{count}x{RANKS // count}"
                    wrong = run(hosts, dattn, strategy, listed[strategy], scratch / f"{pretended}/{strategy}", True, pretended)
                    failures += wrong is not None
                    print("ok   " if wrong is None else "FAIL ", f"{strategy} on one host that pretends to be {pretended}", wrong or "", flush=True)
            decoded = decode(hosts, dattn, scratch / "y1.npy", "2x2") if only == "" else None
        for count in (1, 2, 4):
            with cluster.Cluster(count, mbit=1000, delay_us=100) as hosts:
                for strategy, need in listed.items():
                    if count == 1 and all(strategy in by_host for by_host in BY_HOST.values()):
                        continue  # nothing is compared with it
                    alone, here = scratch / f"1/{strategy}", scratch / f"{count}/{strategy}"
                    wrong = run(hosts, dattn, strategy, need, here, check=count > 1)
                    if wrong is None:
                        pretending = scratch / f"{count}x{RANKS // count}/{strategy}"
                        like = pretending if strategy in BY_HOST.get(count, ()) else alone
                        differ = [name for name in OUTPUTS.values() if (here / name).read_bytes() != (like / name).read_bytes()]
                        wrong = f"{', '.join(differ)} differ from those of one host" if differ else None
                    failures += wrong is not None
                    print("ok   " if wrong is None else "FAIL ", f"{strategy} on {count} hosts x {RANKS // count}", wrong or "", flush=True)
                if count == 2 and only == "":
                    wrong = decoded or decode(hosts, dattn, scratch / "y2.npy")
                    if wrong is None and (scratch / "y1.npy").read_bytes() != (scratch / "y2.npy").read_bytes():
                        wrong = "y differs from that of one host"
                    failures += wrong is not None
                    print("ok   " if wrong is None else "FAIL ", "decode on 2 hosts x 2", wrong or "", flush=True)
    sys.exit(1 if failures or not listed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
