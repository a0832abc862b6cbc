"""dattn decode --cache prefill: prefill over the ranks, the cache handed over, decoding, in one run.

    prefill.py [--only TEXT] DATTN MPIRUN...

y of the prefill and of the last step are held to the layer in double by --check (whose judge is judged by
tests/kernels/latent_oracle.py); decoding gives the bits that it gives after --cache made; the bytes of the ring and of the
exchange are those of the formulas.
"""

import functools
import json
import pathlib
import sys
import tempfile

import end_to_end
import jobs
import oracle
from end_to_end import Trouble, require

HIDDEN, HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V = 24, 5, 20, 16, 8, 4, 8
STEPS, WARMUP = 2, 1
# form, ranks, dtype, new tokens, context, slices, further words
CASES = [
    ("sequence", 4, "f4", 1, (37, 0, 50), 0, ("--hosts", "0,1,0,1")),
    ("heads", 3, "bf16", 3, (37, 0, 50), 0, ()),
    ("heads", 7, "f4", 1, (40, 3), 0, ("--weights-dtype", "bf16")),  # ranks without heads
    ("helix", 4, "f4", 1, (61,), 0, ("--mesh", "2x2")),
    ("tree", 5, "bf16", 1, (2, 33), 0, ()),  # ranks without tokens of a sequence
    ("latent-exact", 8, "f4", 1, (90, 7), 4, ("--basis", "hadamard")),
    ("latent-tpla", 2, "bf16", 1, (64,), 2, ("--basis", "pca", "--calibration", "64")),
    ("sequence", 1, "f4", 2, (20,), 0, ()),
    ("sequence", 3, "f4", 2, (9, 0, 7, 3), 0, ("--prefix-tree", "levels=1x21:2x13x8:4x3")),
    ("heads", 4, "bf16", 1, (0, 5), 0, ("--prefix-tree", "levels=1x30")),
    ("latent-tpla", 4, "f4", 2, (9, 0, 7, 3), 2, ("--prefix-tree", "levels=1x21:2x13x8:4x3")),
    ("latent-exact", 2, "bf16", 1, (0, 5), 2, ("--prefix-tree", "levels=1x30")),
]


def dealt(case):
    """Tokens of the context that each rank has: position p of the cache is rank p mod P's."""
    _, ranks, _, new, context, _, more = case
    counts = [0] * ranks
    first = 0
    if "--prefix-tree" in more:
        mask = f"batch:sequences={len(context)},new=1,{more[1]},suffix={':'.join('1' * len(context))}"
        first = oracle.batch_lengths(mask)[1] - len(context)  # what is shared
        for p in range(first):
            counts[p % ranks] += 1
    for tokens in context:
        for t in range(tokens):
            counts[(first + t) % ranks] += 1
        first += tokens + new * (STEPS + WARMUP)
    return counts


def traffic(case):
    """Bytes and messages of the ring, then of the exchange, of all ranks."""
    form, ranks, dtype, _, _, slices, more = case
    counts, element = dealt(case), 2 if dtype == "bf16" else 4
    row = (KV_RANK + ROPE) * element
    ring = (ranks - 1) * sum(counts) * row, (ranks - 1) * sum(n > 0 for n in counts)
    columns = int(more[1][-1]) if "--mesh" in more else ranks if form == "heads" else 1
    sent = messages = 0
    for r in range(ranks):
        for q in range(ranks):
            if slices:  # its slice of every row, and the key with position
                wants = (KV_RANK // slices + ROPE) * element
            else:  # whole rows, of the tokens of its row of the mesh, if its column has heads
                has_heads = HEADS * (q % columns + 1) // columns > HEADS * (q % columns) // columns
                wants = row * (r // columns == q // columns and has_heads)
            if r != q and wants and counts[r]:
                sent += wants * counts[r]
                messages += 1
    return (*ring, sent, messages)


def between_hosts(case):
    """Bytes of the ring between 0,1,0,1: it goes 0, 2, 1, 3, and to each rank all but what that had itself."""
    if "--hosts" not in case[-1]:
        return 0
    counts, element = dealt(case), 2 if case[2] == "bf16" else 4
    return (2 * sum(counts) - counts[0] - counts[1]) * (KV_RANK + ROPE) * element


def run(start, folder, case, cache):
    form, ranks, dtype, new, context, slices, more = case
    line = f"decode --hidden {HIDDEN} --heads {HEADS} --q-rank {Q_RANK} --kv-rank {KV_RANK} --nope-dim {NOPE} --rope-dim {ROPE} --v-dim {V}"
    line += f" --form {form} --dtype {dtype} --new {new} --context {','.join(map(str, context))} --steps {STEPS} --warmup {WARMUP}"
    line += f" --threads 1 --cache {cache} --check --out {cache}.npy --json {cache}.json" + (f" --slices {slices}" if slices else "")
    done = start.run([*line.split(), *more], ranks, cwd=folder)
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    return (folder / f"{cache}.npy").read_bytes(), json.loads((folder / f"{cache}.json").read_text())


def judge(start, case):
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            y, report = run(start, folder, case, "prefill")
            require(y == run(start, folder, case, "made")[0], "y is not that of a cache that was made")
        prefill = report["prefill"]
        require(prefill["check"]["passed"] is True, f"check of the prefill: {prefill['check']}")
        require(prefill["check"]["bound"] == (8e-3 if case[2] == "bf16" else 1e-5), f"its bound is {prefill['check']['bound']}")
        found = tuple(prefill[key] for key in ("ring_bytes", "ring_messages", "hand_over_bytes", "hand_over_messages"))
        require(found == traffic(case), f"ring and exchange send {found}, not {traffic(case)}")
        between = prefill["ring_bytes_between_hosts"]
        require(between == between_hosts(case), f"the ring sends {between} bytes between hosts, not {between_hosts(case)}")
        require(report["cache"] == "prefill", f"cache is {report['cache']}")
    except Trouble as trouble:
        return str(trouble)
    return None


def refuse(start, words, code, says):
    done = start.run(words.split(), 0)
    wrong = done.returncode != code or says not in done.stderr
    return f"exit code {done.returncode}: {done.stderr}" if wrong else None


def main(arguments):
    only, start = jobs.asked(arguments, __doc__)
    work = [(f"{case[0]} P={case[1]} {case[2]} {case[4]}", functools.partial(judge, start, case)) for case in CASES]
    work.append(("of GQA", functools.partial(refuse, start, "decode --context 5 --cache prefill", 2, "--cache prefill: is of latent attention")))
    memory = "decode --model deepseek-v2-lite --context 8 --cache prefill --memory 60M"
    work.append(("no memory", functools.partial(refuse, start, memory, 4, "latent-sequence needs")))
    sys.exit(1 if end_to_end.judge_all(work, only) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
