"""Starts the dattn command, alone or under mpirun, for the tests beside this file."""

import os
import signal
import subprocess
import sys
import time


class Starter:
    """Knows where dattn and mpirun are."""

    def __init__(self, dattn, mpirun):
        self.dattn = dattn
        self.mpirun = mpirun  # a list: mpirun and its options
        # The singletons of a test, too, must not bind to one core and spin there.
        self.environment = {**os.environ, "OMPI_MCA_mpi_yield_when_idle": "1", "LC_ALL": "C"}
        self.environment.pop("OPENBLAS_CORETYPE", None)  # for NumPy; dattn chooses by itself

    def line(self, words, ranks=0):
        """The command line of `ranks` ranks; 0 is no mpirun at all."""
        start = [*self.mpirun, "-np", str(ranks)] if ranks else []
        return [*start, self.dattn, *words]

    def run(self, words, ranks=0, environment=None, timeout=120, **more):
        """Runs to the end and returns subprocess's result; kills all of it past `timeout`."""
        return self.run_line(self.line(words, ranks), environment, timeout, **more)

    def run_line(self, line, environment=None, timeout=120, **more):
        process = self.start(line, environment, **more)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\n(killed: no end after {timeout} s)"
            return subprocess.CompletedProcess(line, -1, out or "", err)
        return subprocess.CompletedProcess(line, process.returncode, out or "", err or "")

    def start(self, line, environment=None, **more):
        """Popen in a process group of its own."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(
            line,
            env={**self.environment, **(environment or {})},
            text=True,
            errors="replace",
            start_new_session=True,
            **pipes,
        )


def asked(arguments, usage):
    """What `[--only PART] DATTN MPIRUN...` say: the part of a case's name, and a Starter."""
    only = ""
    if arguments[:1] == ["--only"]:
        only, arguments = arguments[1], arguments[2:]
    if len(arguments) < 2:
        sys.exit(usage)
    return only, Starter(arguments[0], arguments[1:])


def wait_for(what, seconds):
    """Whether `what()` becomes true within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return bool(what())


class Failed(Exception):
    """What was wrong."""


def want(right, what):
    if not right:
        raise Failed(what)


def ran(starter, words, ranks=0, code=0):
    """The result of a command that ends with this code."""
    done = starter.run(words, ranks)
    want(done.returncode == code, f"{words}: {done.returncode}, not {code}: {done.stdout}{done.stderr}")
    return done


def refused(starter, words, code, says, ranks=0):
    """The one line that a refused command says; nothing looks like success."""
    done = ran(starter, words, ranks, code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("[rank ")]
    want(len(lines) == 1 and says in lines[0], f"{words}: {done.stderr}")
    want("verdict" not in done.stdout and "time:" not in done.stdout, done.stdout)
    return lines[0]
