"""A cable is cut in the middle of a long job that dattn-run has started: the job ends within a bound
with the documented code, and nothing of it stays on either host.

    cut_cable_test.py DATTN_RUN

Once the ranks just wait for each other. Once a rank dies on each host too, so that mpirun and its
daemon have told the other side to end when it can no longer answer. The two run side by side.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import cluster

LOST = 205
BOUND = 60  # what the documentation calls half a minute, for a busy machine
JOB = ("--hosts host0:2,host1:2 --threads 1 run --tokens 4K --heads 8 --head-dim 64 --strategy ring "
       "--partition contiguous --prefetch 1 --repeat 100000 --out o.npy --json r.json").split()


def until(seconds, what):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    return what()


def ranks_of(hosts, name, program):
    """The ranks of dattn on a host: mpirun and dattn-run name it, too, but are other programs."""
    return [pid for pid in hosts.processes(name) if os.path.realpath(f"/proc/{pid}/exe") == program]


def judge(dattn_run, kill):
    """None, or what is wrong."""
    program = os.path.realpath(os.path.join(os.path.dirname(dattn_run), "dattn"))
    with cluster.Cluster(2, mbit=1000, delay_us=100) as hosts:
        before = {name: hosts.files(name) for name in hosts.names}
        job = hosts.start("host0", [dattn_run, *JOB], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")
        said = ""
        for line in job.stdout:
            said += line
            if line.startswith("plan:"):  # the runs begin
                break
        if not said or job.poll() is not None:
            return f"it did not start: {said}"
        hosts.cut("host1")
        began = time.monotonic()
        if kill:
            for name in hosts.names:
                os.kill(ranks_of(hosts, name, program)[0], signal.SIGKILL)
        try:
            said += job.communicate(timeout=BOUND)[0]
        except subprocess.TimeoutExpired:
            job.kill()
            return f"it goes on {BOUND} s after the cut: {said}"
        if job.returncode != LOST:
            return f"exit code {job.returncode}: {said}"
        if ("has not answered" if kill else "lost communication") not in said:
            return f"it does not say why: {said}"
        alive = lambda: {name: hosts.processes(name) for name in hosts.names}
        if not until(began + BOUND - time.monotonic(), lambda: not any(alive().values())):
            return f"processes are left: {alive()}"
        left = {name: hosts.files(name) - before[name] for name in hosts.names}
        if any(left.values()):
            return f"files are left: {left}"
        if os.listdir("."):
            return f"outputs are left: {os.listdir('.')}"
    return None


def main(arguments):
    if len(arguments) != 1:
        sys.exit(__doc__)
    dattn_run = os.path.abspath(arguments[0])
    cluster.contain()
    failures = 0
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        children = {}
        for kill in (False, True):
            folder = pathlib.Path(scratch, str(kill))
            folder.mkdir()
            pid = os.fork()
            if pid == 0:
                os.chdir(folder)
                wrong = judge(dattn_run, kill)
                print("ok   " if wrong is None else "FAIL ", "cut, and ranks die" if kill else "cut", wrong or "", flush=True)
                os._exit(wrong is not None)
            children[pid] = kill
        for pid in children:
            failures += os.waitpid(pid, 0)[1] != 0
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
