"""Runs the dattn command with --compensate and lets NumPy judge it by the formula.

    compensation.py [--only TEXT] DATTN MPIRUN...

Cases, reports and bounds are those of end_to_end.py; what is expected of O, LSE, dropped keys and
bytes is this file's and the oracle's. --only runs the cases whose line holds TEXT.
"""

import dataclasses
import functools
import pathlib
import sys
import tempfile

import numpy

import end_to_end
import jobs
import oracle
from end_to_end import BASE, PARTITIONS, STRATEGIES, Case, require

# Queries at the end of a longer context; heads by groups, other value heads than key heads.
CHUNK = dataclasses.replace(BASE, queries=20)
INPUTS = (
    CHUNK,
    dataclasses.replace(CHUNK, key_heads=2, value_heads=3),
    dataclasses.replace(BASE, queries=3),
    dataclasses.replace(CHUNK, key_heads=6, value_heads=2),
    dataclasses.replace(CHUNK, stored="f8"),
)
RAZOR = "causal@0-1;stream:sink=4,recent=60@2-5"
MASKS = (
    RAZOR,
    "stream:sink=4,recent=121",
    "window:64,0",
    "s2:block=16,local=2,stride=4,step=2",
    "causal",  # drops nothing
)


def cases():
    table = []

    def add(strategy, ranks, mask, partition, inputs=CHUNK, **more):
        table.append(Case(strategy, ranks, mask, partition, inputs, gradients=False, **more))

    for s, strategy in enumerate(STRATEGIES):
        for n, how in enumerate(("head", "rank")):
            for p, ranks in enumerate((2, 3, 5, 8)):
                turn = s + 2 * n + p
                inputs = INPUTS[(s + p + n) % 5]
                dtype = "bf16" if turn % 4 == 3 else "auto"
                wire = "bf16" if turn % 8 == 1 and inputs.stored != "f8" else "exact"
                add(strategy, ranks, MASKS[turn % 5], PARTITIONS[(turn + p) % 4], inputs,
                    dtype=dtype, wire=wire, compensate=how, twice=p == 1)  # fmt: skip
    for how in ("head", "rank"):
        add("local", 1, RAZOR, "contiguous", compensate=how)
        add("auto", 3, RAZOR, "zigzag", scale=0.2, compensate=how)
        add("gather", 3, RAZOR, "zigzag", soft_cap=0.7, sinks="1.5", compensate=how)
        add("ring", 3, "sink:0", "striped", compensate=how)  # pseudo-keys are all there is to see
        add("gather", 4, RAZOR, "zigzag", BASE, compensate=how)  # as many queries as keys
        add("tree", 7, RAZOR, "balanced", dataclasses.replace(CHUNK, queries=1, keys=5), compensate=how)
        add("usp", 4, RAZOR, "striped", threads=2, compensate=how, twice=True)
    return table


class Bench(end_to_end.Bench):
    def dropped(self, case):
        """Boolean [key heads, keys], and what the mask allows."""
        i = case.inputs
        table = oracle.allowed(case.mask, i.queries, i.keys, i.heads, i.key_heads)
        seen = table.any(axis=1).reshape(i.key_heads, -1, i.keys).any(axis=1)
        return ~seen & (numpy.arange(i.keys) < i.keys - i.queries), table

    def expected(self, case):
        rounds = case.computes_in() == "bf16"
        with self.lock:
            arrays = self.arrays(case.inputs)
        q, k, v, _ = (oracle.bfloat16(x) if rounds else x for x in arrays)
        dropped, table = self.dropped(case)
        owner = oracle.owners(case.partition, case.inputs.keys, case.ranks if case.compensate == "rank" else 1)
        return oracle.compensated(q, k, v, table, case.rules(), dropped, owner), None

    def problem_words(self, case):
        words = ["--compensate", case.compensate] if case.compensate != "off" else []
        return super().problem_words(case) + words

    def judge_reports(self, case, folder):
        super().judge_reports(case, folder)
        plan = self.plan(self.words(case), case)
        i = case.inputs
        dropped = self.dropped(case)[0]
        said = plan["compensation"]
        require(said["dropped_keys"] == dropped.sum(axis=1).tolist(), f"dropped {said['dropped_keys']}")
        pairs = {(h * i.key_heads // i.heads, h * i.value_heads // i.heads) for h in range(i.heads)}
        if case.compensate == "head":
            count = sum(dropped[key].any() for key, _ in pairs)
            sent = 2 * (case.ranks - 1) * count * (i.d_qk + i.d_v) * 8
        else:
            owner = oracle.owners(case.partition, i.keys, case.ranks)
            count = sum(dropped[key, owner == r].any() for key, _ in pairs for r in range(case.ranks))
            sent = (case.ranks - 1) * count * (i.d_qk + i.d_v) * case.delivers().itemsize
        require(said["pseudo_keys"] == count, f"{said['pseudo_keys']} pseudo-keys, not {count}")
        require(sum(said["bytes_sent"]) == sent, f"{said['bytes_sent']} bytes, not {sent}")
        # What the plan counts in all is that and what it would send without.
        off = dataclasses.replace(
            case, compensate="off", strategy=plan["strategy"], prefetch=plan["prefetch"], relay=plan["hosts"]["relays"]
        )
        without = self.plan(self.words(off), off)
        need = plan["kv_cache"]
        added = sum(need["bytes"]) - sum(without["kv_cache"]["bytes"])
        numbers = numpy.sum(need["pseudo_keys"]) * (i.d_qk + 1) + numpy.sum(need["pseudo_values"]) * i.d_v
        require(added == numbers * case.delivers().itemsize, f"a cache of {added} bytes more")
        more = sum(plan["bytes_sent"]) - sum(without["bytes_sent"])
        require(more == sent, f"the plan sends {more} bytes more, not {sent}")


def main(arguments):
    only, start = jobs.asked(arguments, __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(start, pathlib.Path(scratch))
        work = [(f"{case.text()} compensate {case.compensate}", functools.partial(bench.judge, case)) for case in cases()]
        sys.exit(1 if end_to_end.judge_all(work, only) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
