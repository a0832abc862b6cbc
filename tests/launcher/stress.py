"""Kills and stops ranks of the dattn command at random times, and looks at how the job ends.

    stress.py [--from SEED] [--only TEXT] COUNT DATTN MPIRUN...

Each job is one of KINDS, struck by what its seed says: SIGKILL or SIGSTOP, a rank, and a time: a
share of the life of the same job undisturbed, or, for every other one with files, so long after
the first of them has been begun. It must end within a bound, with the code that belongs to the
strike, and leave nothing but whole files: the bytes of the undisturbed job. From flight records
`dattn report` must name the rank that was stopped; one that all others have left, and a single one,
just goes on later. A sweep that is started again must complete its rows. Every job prints a line
with its seed; --from goes on with a seed.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import faults
import jobs

RUN = f"run {faults.MACHINE} --tokens 2000 --heads 4 --head-dim 16 --threads 1 --repeat 10 --mask causal --grad random {faults.FILES} --dq Q.npy"
DECODE = "decode --threads 1 --steps 100 --out O.npy"
ROWS = "rows.jsonl"
ALONE = 6  # seconds; longer than the watchdog of a job and mpirun's end


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    ranks: int
    words: str

    def sweeps(self):
        return self.words.startswith("bench")


KINDS = (
    Kind("ring", 3, f"{RUN} --strategy ring"),
    Kind("ring without windows", 4, f"{RUN} --strategy ring --windows off"),
    Kind("gather", 4, f"{RUN} --strategy gather"),
    Kind("lightseq without windows", 3, f"{RUN} --strategy lightseq --windows off"),
    Kind("ulysses", 2, f"{RUN} --strategy ulysses"),
    Kind("one rank", 1, f"{RUN} --strategy local"),
    Kind("large files", 4, f"run {faults.MACHINE} --tokens 20000 --heads 4 --head-dim 64 --threads 1 --mask window:16,0 --strategy gather {faults.FILES}"),
    Kind("decode", 3, f"{DECODE} --context 900,500 --heads 4 --kv-heads 4 --head-dim 16 --form sequence"),
    Kind("decode latents", 2, f"{DECODE} --context 300 --hidden 256 --heads 4 --q-rank 0 --kv-rank 64 --nope-dim 32 --rope-dim 16 --v-dim 32 --form latent-helix"),
    Kind("prefill", 4, f"{DECODE} --context 2000 --hidden 256 --heads 4 --q-rank 0 --kv-rank 64 --nope-dim 32 --rope-dim 16 --v-dim 32 --form heads --cache prefill"),
    Kind("sweep", 3, f"bench {faults.MACHINE} --tokens 400,500,600,700 --heads 4 --head-dim 16 --strategy ring,gather --threads 1 --repeat 3 --out {ROWS}"),
)


class Trouble(Exception):
    """What is wrong with a job."""


def require(condition, what):
    if not condition:
        raise Trouble(what)


@dataclasses.dataclass
class Undisturbed:
    """What a kind of job does where nothing strikes it."""

    life: float  # seconds
    files: dict  # bytes by name


def files_of(place):
    return {p.name: p.read_bytes() for p in place.work.iterdir() if p.suffix == ".npy"}


def keys_of(place):
    """What the rows of a sweep go by; all lines are whole."""
    lines = (place.work / ROWS).read_text().split("\n") if (place.work / ROWS).exists() else [""]
    require(lines.pop() == "", "the last row is torn")
    return [json.loads(line)["key"] for line in lines]


def undisturbed(kind, start, place):
    for _ in range(3):
        begun = time.monotonic()
        done = faults.run(start, place, kind.words, kind.ranks, "", "")
        if done.returncode != 86:  # a busy machine may take longer to start ranks than the watchdog waits
            break
    require(done.returncode == 0, f"{kind.name}, undisturbed: {faults.said(done)}")
    return Undisturbed(time.monotonic() - begun, {ROWS: sorted(keys_of(place))} if kind.sweeps() else files_of(place))


def ranks_in(place, program):
    """[(pid, rank)] of what runs there."""
    found = []
    for pid in place.processes():
        try:
            if os.readlink(f"/proc/{pid}/exe") == program:
                words = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found += [(pid, int(word[21:])) for word in words if word.startswith(b"OMPI_COMM_WORLD_RANK=")]
        except OSError:
            pass
    return sorted(found, key=lambda one: one[1])


def wait_until(process, what, seconds):
    """Waits so long at most, for `what()` or the end of the job."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not what():
        time.sleep(0.001)


def go_on_alone(process, start, place):
    """Lets a stopped rank go on once it has long been the only one: nobody else notices."""
    alone = [None, 0.0]

    def lonely():
        ranks = ranks_in(place, start.dattn)
        if ranks != alone[0]:
            alone[:] = ranks, time.monotonic()
        time.sleep(0.05)
        return len(ranks) == 1 and time.monotonic() - alone[1] > ALONE

    wait_until(process, lonely, faults.BOUND)
    if process.poll() is None and alone[0]:
        os.kill(alone[0][0][0], signal.SIGCONT)


def strike(kind, normal, dice, process, start, place):
    """(the signal that a rank got, or None if the job was over; the rank; in words)."""
    sign = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    in_output, share, late, which = dice.random() < 0.5, dice.uniform(0.02, 1.1), dice.uniform(0, 0.05), dice.random()
    if in_output:
        begun = lambda: any(name.name.endswith(".npy") or ".tmp." in name.name or name.name == ROWS for name in place.work.iterdir())
        wait_until(process, begun, faults.BOUND)
        wait_until(process, lambda: False, late)
    else:
        wait_until(process, lambda: False, share * normal.life)
    wait_until(process, lambda: ranks_in(place, start.dattn), faults.BOUND)  # they may have yet to begin
    alive = ranks_in(place, start.dattn)
    when = f"{1000 * late:.0f} ms into the output" if in_output else f"at {share:.2f} of its life"
    if not alive or process.poll() is not None:
        return None, None, f"over {when}"
    pid, rank = alive[int(which * len(alive))]
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return None, None, f"over {when}"
    return sign, rank, f"{sign.name} to rank {rank} {when}"


def end_of(process, start, place):
    """(its exit code, or None if there is no end; whether it then was without ranks)."""
    try:
        return process.wait(timeout=faults.BOUND), False
    except subprocess.TimeoutExpired:
        alone = not ranks_in(place, start.dattn)
        return faults.end_of(process, 0), alone


def judge_files(kind, normal, code, start, place):
    """Complete or absent; a sweep goes on where it ended."""
    if kind.sweeps():
        faults.run(start, place, kind.words, kind.ranks, "", "") if code != 0 else None
        require(sorted(keys_of(place)) == normal.files[ROWS], f"{len(keys_of(place))} rows in the end, not {len(normal.files[ROWS])}")
        (place.work / ROWS).unlink()
        return
    files = files_of(place)
    for name, content in files.items():
        require(content == normal.files[name], f"{name} is not that of the undisturbed job")
        (place.work / name).unlink()
    require(code != 0 or files.keys() == normal.files.keys(), f"there is only {sorted(files)}")


def judge(kind, normal, seed, start, place):
    """One job, in words; Trouble if it is not as it should be."""
    dice = random.Random(seed)
    line = place.line(start, kind.words + faults.WATCHED, kind.ranks, "", "")
    with open(place.work / "out", "w+") as out, open(place.work / "err", "w+") as err:
        process = start.start(line, cwd=place.work, stdout=out, stderr=err)
        try:
            sign, rank, story = strike(kind, normal, dice, process, start, place)
            struck = time.monotonic()
            if sign == signal.SIGSTOP:
                go_on_alone(process, start, place)
        finally:
            code, alone = end_of(process, start, place)
        story += f", code {code} after {time.monotonic() - struck:.1f} s"
        err.seek(0)
        errors = err.read()
    try:
        # Who dies or stops behind its last word leaves a job that is done; alone it just goes on.
        stopped = (0,) if kind.ranks == 1 else (faults.STUCK, 0)
        codes = {None: (0,), signal.SIGKILL: (faults.KILLED, 0), signal.SIGSTOP: stopped}[sign]
        # Of a rank that ends in MPI_Init, mpirun itself may crash or lock up in PMIx_server_finalize
        # (Open MPI 4.1.4), once it has ended all ranks; dattn-run ends an mpirun that outlives them.
        crashed = code == -signal.SIGSEGV and "PMIx_server_finalize" in errors
        locked = code is None and alone
        if sign is not None and (crashed or locked):
            story += f" (mpirun {'crashed' if crashed else 'locked up'} at its end)"
            judge_files(kind, normal, code, start, place)
            require(jobs.wait_for(lambda: not place.processes(), 10), f"processes {place.processes()} live on")
            return story
        require(code in codes, f"none of {codes}")
        if code == faults.STUCK:
            require(re.search(r"\[rank \d\] dattn \w+: no rank has moved for \d", errors), "nobody says that nothing moves")
            report = start.run(["report", "flight"], cwd=place.work)
            require(report.returncode == 0 and f"culprit: rank {rank} " in report.stdout, f"the report does not name rank {rank}: {report.stdout}{report.stderr}")
        judge_files(kind, normal, code, start, place)
        if kind.ranks == 1 and code == faults.KILLED:  # there is nobody to take it away
            for temporary in place.work.glob("*.npy.tmp.*"):
                temporary.unlink()
        trouble = place.left(False)
        require(trouble is None, trouble)
    except Trouble as trouble:
        raise Trouble(f"{story}: {trouble}\n{errors}") from None
    return story


def main(words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--from", dest="first", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--only", default="")
    parser.add_argument("count", type=int)
    parser.add_argument("dattn")
    parser.add_argument("mpirun", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    start = jobs.Starter(os.path.realpath(options.dattn), options.mpirun)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    normal, counts, failures = {}, collections.Counter(), 0

    def in_place(act, *arguments):
        with tempfile.TemporaryDirectory() as scratch:
            return act(*arguments, start, faults.Place(pathlib.Path(scratch).resolve()))

    for seed in range(options.first, options.first + options.count):
        kind = KINDS[seed % len(KINDS)]
        if options.only not in kind.name:
            continue
        try:
            if kind not in normal:
                normal[kind] = in_place(undisturbed, kind)
            said = in_place(judge, kind, normal[kind], seed)
            counts[said.split()[0]] += 1
            print("ok   ", f"seed {seed}, {kind.name}: {said}", flush=True)
        except Trouble as trouble:
            failures += 1
            print("FAIL ", f"seed {seed}, {kind.name}: {trouble}", flush=True)
    struck = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"{options.count} jobs from seed {options.first} on: {struck}; {failures} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
