"""Runs with --manifest and lets the xxHash library itself, and dattn verify, judge what it says.

    manifest.py DATTN MPIRUN...

Exit code 77: this dattn has no xxHash, or there is no library of it.
"""

import ctypes
import ctypes.util
import json
import pathlib
import sys
import tempfile

import numpy

import jobs

USAGE, INPUT, CORRUPT = 2, 3, 74
TOKENS, HEADS, DIM = 41, 3, 8


def xxh3(library, data):
    data = numpy.ascontiguousarray(data).tobytes()
    return f"{library.XXH3_64bits(data, len(data)):016x}"


def rows_of(part):
    return numpy.concatenate([first + step * numpy.arange(count) for first, count, step in part["rows"]]).astype(int)


def require(true, what):
    if not true:
        sys.exit(f"FAIL  {what}")


def judge(start, library, folder, partition, ranks):
    """One run; its manifest says what its files are, to the last row, and verify sees what changes."""
    work = folder / f"work_{partition}"
    work.mkdir()
    rng = numpy.random.default_rng(5)
    for name in ("q", "k", "v", "do"):
        numpy.save(work / f"{name}.npy", rng.standard_normal((TOKENS, HEADS, DIM)).astype("<f4"))
    outputs = ("out", "lse", "dq", "dk", "dv")
    words = "run --q q.npy --k k.npy --v v.npy --grad do.npy --mask causal --strategy ring --threads 1 --manifest m.json --verify-wire --check"
    words += f" --partition {partition} --machine latency=1e-6,bandwidth=1e9,rate=1e9 " + " ".join(f"--{name} {name}.npy" for name in outputs)
    done = start.run(words.split(), ranks, cwd=work)
    # Forward K and V go to each other rank; backward they do again, and dK and dV come home.
    sent = [2 * ranks * (ranks - 1), 4 * ranks * (ranks - 1)]
    said = [f"verified: {n} messages" in done.stdout for n in sent]
    require(done.returncode == 0 and said == [True, True], done.stdout + done.stderr)
    manifest = json.loads((work / "m.json").read_text())
    entries = manifest["inputs"] + manifest["outputs"]
    require([e["option"] for e in entries] == ["q", "k", "v", "grad", *outputs], entries)
    for entry in entries:
        array = numpy.load(work / entry["file"])
        require(entry["dtype"] == array.dtype.str[1:] and entry["shape"] == list(array.shape), entry)
        for part in entry["parts"]:
            require(part["xxh3_64"] == xxh3(library, array[rows_of(part)]), (entry["file"], part))
        rows = numpy.concatenate([rows_of(part) for part in entry["parts"]])
        require(sorted(rows) == list(range(TOKENS)), (entry["file"], rows))
        require(len(entry["parts"]) == (1 if entry in manifest["inputs"] else ranks), entry)
    # Names go by the manifest's folder, wherever that is and whoever asks.
    moved = work.rename(folder / f"moved_{partition}")
    verify = lambda: start.run(["verify", str(moved / "m.json")], cwd=folder)
    done = verify()
    require(done.returncode == 0 and done.stdout.count("ok ") == len(entries), done.stdout + done.stderr)
    dk = numpy.load(moved / "dk.npy")
    bits = dk.view("<u4")
    bits[17, 1, 2] ^= 1
    numpy.save(moved / "dk.npy", dk)
    owner = next(p["rank"] for p in manifest["outputs"][3]["parts"] if 17 in rows_of(p))
    done = verify()
    require(done.returncode == CORRUPT and done.stdout.count("CHANGED") == 1, done.stdout + done.stderr)
    require("dk.npy: has changed in rows [[" in done.stdout and f"of rank {owner}: XXH3-64" in done.stdout, done.stdout)
    numpy.save(moved / "dk.npy", dk[:-1])
    (moved / "lse.npy").unlink()
    done = verify()
    require(done.returncode == CORRUPT and done.stdout.count("CHANGED") == 2 and "has the shape" in done.stdout and "No such file" in done.stdout, done.stdout)


def refused(start, folder):
    (folder / "none.json").write_text("{")
    (folder / "rows.json").write_text('{"version": 1, "inputs": [{"file": "x.npy", "dtype": "f4", "shape": [3], "parts": [{"rank": 0, "rows": [[2, 9223372036854775807, 9223372036854775807]], "xxh3_64": ""}]}], "outputs": []}')
    numpy.save(folder / "x.npy", numpy.ones(3, "<f4"))
    for words, code, says in (
        ("verify", USAGE, "dattn verify MANIFEST"),
        ("verify absent.json", INPUT, "No such file"),
        ("verify none.json", INPUT, "is not one"),
        ("verify x.npy", INPUT, "is not one"),
        ("verify rows.json", CORRUPT, "has no rows [2,9223372036854775807,9223372036854775807]"),
        ("run --tokens 9 --manifest -", USAGE, "--manifest"),
        ("run --tokens 9 --out o.npy --manifest o.npy", USAGE, "same file"),
    ):
        done = start.run(words.split(), cwd=folder)
        require(done.returncode == code and says in done.stdout + done.stderr, (words, done.returncode, done.stdout, done.stderr))
        require(not list(folder.glob("o.npy*")), words)


def main(arguments):
    _, start = jobs.asked(arguments, __doc__)
    version = start.run(["--version"]).stdout
    name = ctypes.util.find_library("xxhash")
    if "without xxHash" in version or name is None:
        print(f"skipped: {version.splitlines()[1] if name else 'there is no libxxhash'}")
        sys.exit(77)
    library = ctypes.CDLL(name)
    library.XXH3_64bits.restype = ctypes.c_uint64
    library.XXH3_64bits.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch).resolve()
        judge(start, library, folder, "striped", 3)
        judge(start, library, folder, "zigzag", 5)
        refused(start, folder)
    print("manifests hold")


if __name__ == "__main__":
    main(sys.argv[1:])
