"""dattn under Slurm: one node, whose daemons run for the length of this test, in a folder of its own.

    slurm_test.py DATTN

Skipped (77) where Slurm is not installed, or starts no job of this user's within a bound.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

SKIPPED, BOUND = 77, 60
NEEDED = ("slurmctld", "slurmd", "srun", "salloc", "sinfo")
LONG = "run --tokens 1000 --strategy ring --machine latency=1e-6,bandwidth=1e9,rate=1e9 --threads 1 --repeat 1000000 --out O.npy"

CONFIGURATION = """
ClusterName=dattn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class NoSlurm(Exception):
    """Why there are no jobs of Slurm here."""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(what, seconds=BOUND):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    return what()


@contextlib.contextmanager
def slurm(folder):
    """A controller and a node; SLURM_CONF leads to them."""
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        raise NoSlurm(f"{missing[0]} is not found; install slurmctld, slurmd, slurm-client and slurm-wlm-basic-plugins")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    # A node has more cpus than ranks will want, whatever there is; nothing is measured here.
    text = CONFIGURATION.format(host=socket.gethostname().split(".")[0], ports=free_ports(2), folder=folder,
                                user=os.popen("id -un").read().strip(), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons = []
    try:
        with open(folder / "log", "w") as log:
            for line in (["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
                daemons.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        idle = lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout
        if not wait_for(idle, 30):
            raise NoSlurm(f"its node does not come up: {(folder / 'log').read_text()[-500:]}")
        if "pmix" not in subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True).stdout:
            raise NoSlurm("its srun knows no pmix")
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def call(line, folder):
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=BOUND, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


def cases(dattn, folder):
    """(what, None or what is wrong)."""
    few = "run --tokens 101 --check --threads 1".split()
    srun = ["srun", "--mpi=pmix", "--overcommit", "-n", "3"]
    code, said = call([*srun, dattn, *few], folder)
    yield "srun --mpi=pmix", None if code == 0 and " over 3 ranks " in said and "PASSED" in said else (code, said)
    code, said = call([*srun, dattn, "run", "--bogus"], folder)
    yield "dattn's own complaint", None if code == 2 and said.count("dattn run: ") == 1 else (code, said)
    code, said = call(["salloc", "-n", "1", os.path.join(os.path.dirname(dattn), "dattn-run"), "--np", "1", *few], folder)
    yield "dattn-run in salloc", None if code == 0 and "PASSED" in said else (code, said)
    yield "a rank is killed", killed(srun, dattn, folder)


def killed(srun, dattn, folder):
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        job = subprocess.Popen([*srun, dattn, *LONG.split()], cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    try:
        said = lambda: (folder / "out").read_text()
        if not wait_for(lambda: "\nplan: " in said() or job.poll() is not None):
            return "it did not start"
        found = re.search(r"^# +1 +\S+ +(\d+) ", said(), re.MULTILINE)
        if not found:
            return said() + (folder / "err").read_text()
        os.kill(int(found[1]), signal.SIGKILL)
        code = job.wait(BOUND)
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()
    left = sorted(path.name for path in folder.iterdir() if "npy" in path.name)
    return None if code == 137 and not left else (code, left, (folder / "err").read_text())


def main(dattn):
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        try:
            with slurm(folder):
                for name, wrong in cases(os.path.realpath(dattn), folder):
                    failures += wrong is not None
                    print("ok   " if wrong is None else "FAIL ", name, wrong or "", flush=True)
        except NoSlurm as why:
            print(f"skipped: {why}", file=sys.stderr)
            sys.exit(SKIPPED)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1])
