"""Makes ranks of the dattn command fail in every way, and looks at how the job ends.

    faults.py [--only TEXT] LIBRARY DATTN MPIRUN...

A job that fails must end within a bound, with the documented exit code and a line that names the
rank; leave no output, temporary, process, shared memory or session folder behind; and leave flight
records, where any rank could write them, from which `dattn report` names the culprit. LIBRARY is
tests/comm/faults.cpp, preloaded into the ranks.
"""

import dataclasses
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import jobs

KILLED = 128 + signal.SIGKILL
CHECK, USAGE, MEMORY, OUTPUT, BUG, CORRUPT, STUCK, INTERRUPTED = 1, 2, 4, 5, 70, 74, 86, 130
BOUND = 40  # seconds; a job takes three or four of them on an idle machine
FILES = "--out O.npy --lse L.npy"
MACHINE = "--machine latency=1e-6,bandwidth=1e9,rate=1e9"  # nothing is measured
RING = f"run {MACHINE} --tokens 200 --heads 4 --head-dim 16 --strategy ring --mask full --threads 1 {FILES}"
DECODE = "decode --context 96 --heads 4 --kv-heads 4 --head-dim 16 --threads 1 --form sequence --out O.npy"
BY_MPI = RING + " --windows off"
VERIFIED = BY_MPI + " --verify-wire"
TREE = VERIFIED.replace("ring", "tree")
LATENT = "decode --context 41 --form latent-tpla --hidden 24 --heads 4 --kv-rank 16 --nope-dim 8 --rope-dim 4 --v-dim 8 --threads 1 --verify-wire --out O.npy"
LARGE = BY_MPI.replace("--tokens 200", "--tokens 4000")
SWEEP = f"bench {MACHINE} --tokens 200,201 --heads 4 --head-dim 16 --strategy ring --mask full --threads 1 --repeat 1 --warmup 0 --out rows.jsonl"
WATCHED = " --watchdog 2 --flight-dir flight"


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    fault: str  # DATTN_FAULT
    code: int
    says: str = ""  # regular expression on stderr
    report: str = ""  # on the report; empty: there are no flight records
    words: str = RING
    ranks: int = 3
    kept: tuple = ()  # results that stay


# fmt: off
CASES = (
    Fault("stopped in a step", "rank=1 call=compute at=2 do=stop", STUCK, r"\[rank [02]\].*forward pass, step \d+ \(.*waiting for a (receive|send|return) of \d+ bytes (from|to) rank", r"culprit: rank 1 "),
    Fault("stopped in a step, without windows", "rank=1 call=send at=3 do=stop", STUCK, r"\[rank [02]\].*forward pass, step \d+ \(.*waiting for a (receive|send) of \d+ bytes (from|to) rank", r"culprit: rank 1 ", BY_MPI),
    Fault("stopped while decoding", "rank=0 call=send at=2 do=stop", STUCK, r"\[rank [12]\] dattn decode: .*decoding, step", "culprit: rank 0 ", DECODE),
    Fault("stopped before MPI", "rank=1 call=init at=1 do=stop", STUCK, r"\[rank 0\].*start, waiting for all ranks in MPI_Init", "culprit: rank 1 left no record"),
    Fault("collective left out", "rank=2 call=barrier at=1 do=leave", STUCK, "waiting for all ranks in barrier", r"culprit: rank 2 .*is beyond collective number \d+, barrier", ranks=4),
    Fault("hanging file system", "rank=1 call=write at=1 do=hang", STUCK, r"\[rank 1\].*output, at work of its own", "culprit: rank 1 .*waits for nobody and does not move: output"),
    Fault("killed in MPI_Init", "rank=1 call=init at=1 do=kill", KILLED),
    Fault("killed in a step", "rank=0 call=compute at=2 do=kill", KILLED),
    Fault("killed in a step, without windows", "rank=0 call=send at=4 do=kill", KILLED, words=BY_MPI),
    Fault("killed before others join its file", "rank=0 call=write at=1 do=kill", KILLED),
    Fault("killed before the second name", "rank=0 call=rename at=1 do=kill", KILLED),
    Fault("early exit", "rank=2 call=compute at=2 do=exit", 1, "improperly"),
    Fault("message cut short", "rank=0 call=send at=2 do=shorten", BUG, r"\[rank \d\] dattn run: step \d+ \(recv .*\): message from rank 0 to rank \d: expected \d+ bytes, got \d+; see dattn report flight", r"culprit: rank \d .*failed: step", BY_MPI),
    Fault("bit of a message", "rank=0 call=send at=1 do=corrupt", CORRUPT, r"\[rank 1\] dattn run: step \d+ \(recv +K.*\): K\[.*\] from rank 0 \(its step \d+\) is not what was sent: it is corrupted, XXH3-64 [0-9a-f]{16} where the sender had [0-9a-f]{16}; memory or the network .*; see dattn report flight", r"culprit: rank 1 .*failed: step", VERIFIED),
    Fault("bit of what comes beside it", "rank=2 call=send at=4 do=corrupt", CORRUPT, r"\[rank 0\] dattn run: step \d+ \(recv +V.*\): V.* from rank 2 .*: what comes beside it is corrupted", r"culprit: rank 0 .*failed: step", VERIFIED),
    Fault("bit of a message, while decoding", "rank=0 call=send at=3 do=corrupt", CORRUPT, r"\[rank \d\] dattn decode: .*from rank 0 .*is corrupted, XXH3-64", r"culprit: rank \d .*failed: step", DECODE + " --verify-wire"),
    Fault("bit of an addend", "rank=1 call=send at=1 do=corrupt", CORRUPT, r"\[rank [02]\] dattn run: step \d+ \(reduce.*\): addend of an all-reduce inside the host from rank 1 is not what was sent: it is corrupted, XXH3-64 .*; see dattn report flight", r"culprit: rank [02] .*failed: step", TREE),
    Fault("bit of an addend, on pretended hosts", "rank=1 call=send at=1 do=corrupt", CORRUPT, r"\[rank [02]\] dattn run: .*: addend of an all-reduce between hosts from rank 1 is not what was sent", r"culprit: rank [02] .*failed: step", TREE + " --hosts 0,1,2"),
    Fault("bit of what a latent layer exchanges", "rank=2 call=send at=1 do=corrupt", CORRUPT, r"\[rank [01]\] dattn decode: x W_DQ and x W_DKV from rank 2 is not what was sent", r"culprit: rank [01] .*failed: x W_DQ", LATENT),
    Fault("killed before the manifest", "rank=0 call=rename at=3 do=kill", KILLED, words=RING + " --manifest M.json", kept=("L.npy", "O.npy")),
    Fault("another MPI on one rank", "rank=1 call=version at=1 do=other", USAGE, r"\[rank 0\] dattn run: rank 1 has MPI library '.*' where rank 0 has '.*'; install the same dattn and the same MPI on all hosts"),
    Fault("disk full at a later rank", "rank=1 call=write at=1 do=full", OUTPUT, r"\[rank 1\].*No space left.*free space"),
    Fault("no memory in a step", "rank=1 call=compute at=1 do=starve", MEMORY, r"\[rank 1\] dattn run: out of memory; .*see dattn report flight", "culprit: rank 1 .*failed: out of memory", LARGE),
    Fault("busy, not stuck", "rank=1 call=barrier at=1 do=busy", 0),
    Fault("busy in a step", "rank=1 call=compute at=2 do=busy", 0),
    Fault("busy while decoding", "rank=1 call=send at=2 do=busy", 0, words=DECODE),
)
# fmt: on


class Place:
    """Folders of one job: where it works, and where MPI keeps what it must take away again."""

    def __init__(self, path):
        self.work, self.session, self.shared = (path / name for name in ("work", "session", "shared"))
        for folder in (self.work, self.session, self.shared):
            folder.mkdir()

    def line(self, start, words, ranks, library, fault):
        mpirun = [*start.mpirun, "--mca", "orte_tmpdir_base", str(self.session), "--mca", "btl_vader_backing_directory", str(self.shared)]
        if fault:
            mpirun += ["-x", f"LD_PRELOAD={library}", "-x", f"DATTN_FAULT={fault}"]
        return [*mpirun, "-np", str(ranks), start.dattn, *words.split()]

    def processes(self):
        """Those that work here, zombies left out."""
        found = []
        for process in pathlib.Path("/proc").iterdir():
            try:
                if process.name.isdigit() and os.readlink(process / "cwd") == str(self.work):
                    found.append(int(process.name))
            except OSError:
                pass
        return found

    def left(self, good, kept=()):
        """What is wrong with what the job leaves behind; `kept` is meant to stay."""
        if not jobs.wait_for(lambda: not self.processes(), 10):
            return f"processes {self.processes()} live on"
        if not jobs.wait_for(lambda: not files_under(self.session) and not files_under(self.shared), 5):
            return f"MPI's {files_under(self.session)} {files_under(self.shared)} are left"
        results = [p.name for p in self.work.iterdir() if p.name not in ("flight", "out", "err", *kept)]
        if not good and results:
            return f"{results} are left"
        return None


def files_under(folder):
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()]


def run(start, place, words, ranks, library, fault, **more):
    line = place.line(start, words, ranks, library, fault)
    return start.run_line(line, timeout=BOUND, cwd=place.work, **more)


def said(done):
    return f"exit code {done.returncode}:\n{done.stdout}{done.stderr}"


def judge(case, start, place, library):
    done = run(start, place, case.words + WATCHED, case.ranks, library, case.fault)
    if done.returncode == -1 and "call=init" in case.fault:
        # mpirun itself may lock up of a rank that ends in MPI_Init (see stress.py), but not every time.
        again = place.work.parent / "again"
        again.mkdir()
        place = Place(again)
        done = run(start, place, case.words + WATCHED, case.ranks, library, case.fault)
    if done.returncode != case.code or not re.search(case.says, done.stderr) or "fault: " not in done.stderr:
        return said(done)
    if case.code == STUCK and not re.search(r"\[rank \d\] dattn \w+: no rank has moved for 2", done.stderr):
        return said(done)
    if trouble := place.left(case.code == 0, case.kept):
        return f"{trouble}\n{said(done)}"
    if not all((place.work / name).exists() for name in case.kept):
        return f"of {case.kept} there is only {files_under(place.work)}"
    flight = place.work / "flight"
    if not case.report:
        # Whoever dies is named by mpirun; whatever all ranks know is said in one line.
        return f"flight records: {files_under(flight)}" if flight.exists() else None
    report = start.run(["report", "flight"], cwd=place.work)
    if report.returncode != 0 or not re.search(case.report, report.stdout):
        return f"the report says {report.stdout}{report.stderr}\n{said(done)}"
    return None


# What is no table row.


def records_cut_or_missing(start, place, library):
    """The report makes do with what there is; and says so where there is nothing."""
    done = run(start, place, RING + WATCHED, 4, library, "rank=2 call=barrier at=1 do=leave")
    flight = place.work / "flight"
    names = sorted(p.name for p in flight.iterdir()) if flight.exists() else []
    if done.returncode != STUCK or len(names) != 4:
        return f"{names}\n{said(done)}"
    ask = lambda: start.run(["report", "flight"], cwd=place.work)
    last = flight / names[3]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    if "culprit: rank 3 left a record that is cut off" not in ask().stdout:
        return ask().stdout
    last.unlink()
    (flight / names[0]).unlink()
    report = ask().stdout
    if "culprit: rank 0 left no record" not in report or "culprit: rank 3 left no record" not in report:
        return report
    for name in names[1:3]:
        (flight / name).unlink()
    nothing = ask()
    return None if nothing.returncode == 3 and "no flight record" in nothing.stderr else said(nothing)


def wrong_argument_on_one_rank(start, place, library):
    one = place.line(start, RING, 2, library, "")
    done = start.run_line([*one, ":", "-np", "1", start.dattn, *RING.replace("200", "201").split()], timeout=BOUND, cwd=place.work)
    if done.returncode != 2 or not re.search(r"\[rank 0\].*rank 2 has queries '201' where rank 0 has '200'", done.stderr):
        return said(done)
    return place.left(False)


def another_build_on_one_rank(start, place, library):
    """A copy of dattn is the same build; one that was linked from anything else is not."""
    copy = place.work.parent / "dattn"
    note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"  # a GNU build-id: 20 bytes follow
    program = pathlib.Path(start.dattn).read_bytes()
    at = program.index(note) + len(note)
    for other, code in ((program, 0), (program[:at] + bytes([program[at] ^ 1]) + program[at + 1 :], USAGE)):
        copy.write_bytes(other)
        copy.chmod(0o755)
        one = place.line(start, RING, 2, library, "")
        done = start.run_line([*one, ":", "-np", "1", str(copy), *RING.split()], timeout=BOUND, cwd=place.work)
        named = re.search(r"\[rank 0\].*rank 2 has build '[0-9a-f]{40}' where rank 0 has '[0-9a-f]{40}'; install the same", done.stderr)
        if done.returncode != code or bool(named) is (code == 0):
            return said(done)
        for name in ("O.npy", "L.npy"):
            (place.work / name).unlink(missing_ok=code != 0)
    return place.left(False)


def told_to_end(start, place, library):
    """SIGTERM and SIGINT to one rank, in a job of several."""
    for sign in (signal.SIGTERM, signal.SIGINT):
        with open(place.work / "out", "w+") as out, open(place.work / "err", "w+") as err:
            words = RING.replace("--tokens 200", "--tokens 64K")
            process = start.start(place.line(start, words, 2, library, ""), cwd=place.work, stdout=out, stderr=err)
            begun = lambda: re.findall(r"^# +\d+ +\S+ +(\d+) ", (place.work / "out").read_text(), re.MULTILINE)
            if not jobs.wait_for(lambda: len(begun()) == 2, BOUND):
                process.kill()
                return "it did not start"
            os.kill(int(begun()[0]), sign)
            code = end_of(process)
        if code != INTERRUPTED:
            return f"{sign.name}: exit code {code}: {(place.work / 'err').read_text()}"
        if trouble := place.left(False):
            return f"{sign.name}: {trouble}"
    return None


def end_of(process, seconds=BOUND):
    """The exit code; None if there is no end."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def sweep_with_a_stuck_configuration(start, place, library):
    """A configuration that is stuck has a row, so the sweep that is started again goes on behind it.
    --again gives it another."""
    rows = place.work / "rows.jsonl"
    ends = lambda: [(row["asked"]["tokens"], row["exit"]) for row in map(json.loads, rows.read_text().splitlines())]
    done = run(start, place, SWEEP + WATCHED, 3, library, "rank=1 call=compute at=2 do=stop")
    if done.returncode != STUCK or ends() != [(200, STUCK)] or "2 s" not in json.loads(rows.read_text())["reason"]:
        return f"{ends()}\n{said(done)}"
    again = SWEEP.replace("200,201", "200") + " --again"
    done = run(start, place, again + WATCHED, 3, library, "rank=1 call=compute at=2 do=stop")
    if done.returncode != STUCK or ends() != [(200, STUCK), (200, STUCK)]:
        return f"--again: {ends()}\n{said(done)}"
    done = run(start, place, SWEEP + WATCHED, 3, library, "")
    if done.returncode != 0 or ends() != [(200, STUCK), (200, STUCK), (201, 0)]:
        return f"{ends()}\n{said(done)}"
    rows.unlink()
    return place.left(False)


SPECIAL = (records_cut_or_missing, wrong_argument_on_one_rank, another_build_on_one_rank, told_to_end, sweep_with_a_stuck_configuration)


def main(arguments):
    named = arguments[:2] if arguments[:1] == ["--only"] else []
    library = os.path.abspath(arguments[len(named)])
    only, start = jobs.asked([*named, *arguments[len(named) + 1 :]], __doc__)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tests = [(case.name, lambda place, case=case: judge(case, start, place, library)) for case in CASES]
    tests += [(f.__name__, lambda place, f=f: f(start, place, library)) for f in SPECIAL]
    count = failures = 0
    without = next((line for line in start.run(["--version"]).stdout.splitlines() if "without xxHash" in line), None)
    needs = {case.name for case in CASES if re.search("--verify-wire|--manifest", case.words)}
    for name, test in tests:
        if only not in name:
            continue
        if without and name in needs:
            print("skip ", name, f"({without})")
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            complaint = test(Place(pathlib.Path(scratch).resolve()))
        count += 1
        failures += complaint is not None
        print("ok   " if complaint is None else "FAIL ", name, f"({time.monotonic() - begun:.1f} s)", flush=True)
        if complaint is not None:
            print("      " + complaint.strip().replace("\n", "\n      "), flush=True)
    print(f"{count} cases, {failures} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
