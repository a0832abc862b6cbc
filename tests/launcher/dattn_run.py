"""dattn-run on one host: the line that it makes, what it refuses, codes, signals, and what it leaves.

    dattn_run.py [--only TEXT] DATTN

Jobs over hosts are in tests/cluster.
"""

import concurrent.futures
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile

import jobs

LONG = "run --tokens 2K --strategy ring --repeat 100000 --threads 1 --out O.npy"
HOSTS = "--hosts a:2,b:2 --cpus 4"

# Words, and what the one line on stderr must say; the code is 2.
REFUSED = (
    ("", "what shall dattn do"),
    ("run", "how many ranks"),
    ("--np 0 run", "--np '0'.*1 to"),
    ("--np -3 run", "--np '-3'.*1 to"),
    ("--np= run", "needs a value"),
    ("--np 2 --np 2 run", "--np is given twice"),
    ("--np --threads 2 run", "--np has no value"),
    ("--tokens 8K run", "no option '--tokens'.*follow its command"),
    ("-n 2 run", "no option '-n'"),
    ("--print-command=yes --np 2 run", "takes no value"),
    ("--np 2 --threads 0 run", "--threads '0'"),
    ("--np 2 --threads 2 run --threads 3", "--threads '2'.*'3'.*once"),
    ("--np 2 run --threads x", "--threads 'x'"),
    ("--np 2 --cpus none run", "--cpus 'none'"),
    ("--np 2 --limit 1.5 run", "--limit '1.5'"),
    ("--np 2 --net nothing0 run", "--net 'nothing0'.*10.0.0.0/24.*lo"),
    ("--np 2 --net 10.0.0.0/33 run", "--net '10.0.0.0/33'"),
    ("--np 2 --net 10.0.0.1 run", "--net '10.0.0.1'"),
    ("--hosts a:2 --hostfile f run", "one of the two"),
    ("--hosts a:2,,b:1 run", "--hosts 'a:2,,b:1'.*HOST:N"),
    ("--hosts a run", "--hosts 'a'.*HOST:N"),
    ("--hosts a:x run", "ranks of a: 'x'"),
    ("--hosts a:1,a:2 run", "a stands twice"),
    ("--hosts -o:1 run", "HOST:N"),
    ("--hosts a:2,b:2 --np 5 run", "--np 5.*4 ranks"),
    ("--hostfile missing run", "--hostfile 'missing': No such file"),
    ("--hostfile no_slots run", "HOST slots=N"),
    (f"{HOSTS} run --watchdog 11", "--watchdog 11.*11 s"),
    ("--np 2 --program nothing/there run", "no program 'nothing/there'"),
    ("--np 2 --program a\x1b[31mb run", r"a\\x1b\[31mb"),
)

# Words, what the printed line must hold, and what it must not.
LINES = (
    ("--np 4 --cpus 8 run --tokens 9", ("-np 4 -H localhost:4 --map-by slot:PE=2 --bind-to core", "-x OMP_NUM_THREADS=2", "/dattn run --tokens 9$"),
     ("oversubscribe", "keepalive", "yield")),
    ("--np 4 --cpus 8 --threads 3 run", ("--bind-to none --oversubscribe --mca mpi_yield_when_idle 1", "-x OMP_NUM_THREADS=3"), ("PE=",)),
    ("--np 9 --cpus 8 run", ("mpi_yield_when_idle 1", "OMP_NUM_THREADS=1"), ("PE=",)),
    ("--np 2 --cpus 8 run --threads=4", ("slot:PE=4", "OMP_NUM_THREADS=4", "--threads=4$"), ()),
    ("--np 2 --limit 60 --net lo run", ("^timeout -k 10 60 mpirun", "btl_tcp_if_include lo --mca oob_tcp_if_include lo"), ()),
    (f"{HOSTS} run --watchdog 12", ("-np 4 -H a:2,b:2 --map-by slot:PE=2", "oob_tcp_keepalive_time 5", "oob_tcp_keepalive_intvl 2",
                                    "oob_tcp_keepalive_probes 3", "orte_launch_agent '[^']*/dattn-run --daemon orted'"), ("oversubscribe",)),
    ("--hosts a:5,b:1 --cpus 4 run --watchdog 0", ("-np 6 ", "oversubscribe"), ()),  # five do not fit
    ("--hosts a:4,b:4 --np 3 --cpus 6 run", ("-np 3 -H a:4,b:4 --map-by slot:PE=2",), ()),
    ("--hostfile hosts --cpus 3 run", ("-np 5 --hostfile hosts --map-by slot:PE=1",), ()),
    ("--np 1 --cpus 1 run", ("-x DATTN_ISA=portable", "-x 'OPENBLAS_X=a b'"), ("SECRET",)),
    ("--np 1 --program true -- --np 3", ("/true --np 3$",), ("/dattn ",)),
)


class Trouble(Exception):
    """What is wrong with a case."""


def require(condition, what):
    if not condition:
        raise Trouble(what)


def runs(pid):
    """Whether a process exists and is not just waiting to be collected."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Bench:
    def __init__(self, dattn, scratch):
        self.dattn_run = os.path.join(os.path.dirname(os.path.abspath(dattn)), "dattn-run")
        self.scratch = scratch
        self.start = jobs.Starter(dattn, [])
        (scratch / "hosts").write_text("# two\na slots=3\n\nb  slots=2 # the other\n")
        (scratch / "no_slots").write_text("a slots=3\nb\n")

    def call(self, words, **more):
        return self.start.run_line([self.dattn_run, *words.split()], **{"cwd": self.scratch, "stdin": subprocess.DEVNULL, **more})

    def refuses(self, words, says):
        done = self.call(words)
        require(done.returncode == 2, f"exit code {done.returncode}: {done.stderr}")
        require(done.stdout == "" and done.stderr.startswith("dattn-run: ") and done.stderr.count("\n") == 1, f"not one line: {done}")
        require(re.search(says, done.stderr), f"no '{says}' in {done.stderr}")

    def prints(self, words, holds, lacks):
        environment = {"DATTN_ISA": "portable", "OPENBLAS_X": "a b", "SECRET": "s", "OMP_NUM_THREADS": ""}
        done = self.call(f"--print-command {words}", environment=environment)
        require(done.returncode == 0 and done.stderr == "", f"{done}")
        for text in holds:
            require(re.search(text, done.stdout), f"no '{text}' in {done.stdout}")
        for text in lacks:
            require(text not in done.stdout, f"'{text}' in {done.stdout}")

    def ends(self, words, code, says):
        done = self.call(words)
        require(done.returncode == code, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
        require(says in done.stdout + done.stderr, f"no '{says}' in {done.stdout}{done.stderr}")
        return done

    def line_is_what_runs(self):
        done = self.ends("--np 2 --threads 1 run --tokens 31 --check", 0, "PASSED")
        line = done.stderr.splitlines()[0].removeprefix("dattn-run: ")
        again = self.start.run_line(shlex.split(line))
        require(again.returncode == 0 and "PASSED" in again.stdout, f"{line}: {again}")

    def stopped(self, name, options, act, code):
        """A long job, its middle, `act(dattn-run, mpirun)`, and what is left."""
        folder = self.scratch / name
        session = folder / f"ompi.{socket.gethostname()}.{os.getuid()}"
        other = session / "pid.1"  # of somebody else's job
        other.mkdir(parents=True)
        line = [self.dattn_run, *f"--np 2 {options} {LONG}".split()]
        process = self.start.start(line, environment={"TMPDIR": str(folder)}, cwd=folder, stdin=subprocess.DEVNULL)
        try:
            begun = any(text.startswith("plan:") for text in iter(process.stdout.readline, ""))
            require(begun, "it did not start")
            mine = {path.name: int(path.name[4:]) for path in session.glob("pid.*")} | {"pid.1": 1}
            require(len(mine) == 2, f"one mpirun has a session there: {mine}")
            mpirun = max(mine.values())
            ranks = pathlib.Path(f"/proc/{mpirun}/task/{mpirun}/children").read_text().split()
            shared = {word for rank in ranks for word in pathlib.Path(f"/proc/{rank}/maps").read_text().split() if word.startswith("/dev/shm/")}
            require(len(ranks) == 2 and shared, f"two ranks share memory: {ranks}, {shared}")
            act(process, mpirun)
            out, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        require(process.returncode == code, f"exit code {process.returncode}: {out}{err}")
        # After dattn-run itself was killed, mpirun has yet to end.
        gone = lambda: not any(map(runs, ranks)) and not any(map(os.path.exists, shared))
        require(jobs.wait_for(gone, 30 if code < 0 else 0), f"left of ranks {ranks} or {shared}: "
                f"{[rank for rank in ranks if runs(rank)]}, {[path for path in shared if os.path.exists(path)]}")
        require(jobs.wait_for(lambda: sorted(os.listdir(session)) == ["pid.1"], 30 if code < 0 else 0), f"session: {os.listdir(session)}")
        require(sorted(os.listdir(folder)) == [session.name], f"files: {os.listdir(folder)}")

    def work(self):
        for words, says in REFUSED:
            yield f"refuses {words[:60]!r}", lambda words=words, says=says: self.refuses(words, says)
        for words, holds, lacks in LINES:
            yield f"prints {words}", lambda words=words, holds=holds, lacks=lacks: self.prints(words, holds, lacks)
        yield "limit", lambda: self.stopped("limit", "--limit 10", lambda *_: None, 124)
        stop = lambda process, mpirun: (os.kill(mpirun, signal.SIGSTOP), process.terminate())
        yield "an mpirun that does not end", lambda: self.stopped("stop", "", stop, 130)
        to_us = lambda number: lambda process, _: process.send_signal(number)
        yield "SIGTERM", lambda: self.stopped("term", "", to_us(signal.SIGTERM), 130)
        yield "SIGINT", lambda: self.stopped("int", "", to_us(signal.SIGINT), 130)
        yield "SIGKILL", lambda: self.stopped("kill", "", to_us(signal.SIGKILL), -9)
        yield "SIGKILL of mpirun", lambda: self.stopped("mpirun", "", lambda _, mpirun: os.kill(mpirun, signal.SIGKILL), 137)
        yield "the line is what runs", self.line_is_what_runs
        yield "a check that fails", lambda: self.ends("--np 2 run --tokens 101 --scale 30 --check --threads 1", 1, "FAILED")
        yield "dattn's own complaint", lambda: self.ends("--np 2 run --bogus", 2, "[rank 0] dattn run: ")
        yield "another program's code", lambda: self.ends("--np 1 --program sh -- -c exit${IFS}7", 7, "")


def judge(item):
    try:
        item[1]()
    except Trouble as trouble:
        return str(trouble)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(arguments):
    only, start = jobs.asked(arguments + ["mpirun"], __doc__)
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = [item for item in Bench(start.dattn, pathlib.Path(scratch)).work() if only in item[0]]
        # Four at a time, because the long ones wait for mpirun to end.
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
            for (name, _), complaint in zip(work, pool.map(judge, work)):
                failures += complaint is not None
                print("ok   " if complaint is None else "FAIL ", name, complaint or "", flush=True)
    print(f"{len(work)} cases, {failures} failures")
    sys.exit(1 if failures or not work else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
