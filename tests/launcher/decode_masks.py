"""Runs dattn decode under masks and lets NumPy judge O, and what each head keeps in the cache.

    decode_masks.py [--only TEXT] DATTN MPIRUN...

Tokens that a rank keeps of a key head are those that it owns and that a query of the last step sees with a head that
reads the key head; --only runs the cases whose line holds TEXT.
"""

import functools
import json
import math
import pathlib
import sys
import tempfile

import numpy

import decode
import end_to_end
import jobs
import oracle
from end_to_end import BOUND, require

S2 = "s2:block=4,local=2,stride=3,step=1"
STREAM = "stream:sink=3,recent=20"
DUO = {"mask": STREAM, "key_heads": {"0": "causal"}}
DUO_WORDS = f"causal@0-2;{STREAM}@3-5"


def cases():
    """(case, words of the mask for oracle.py, the file of --head-masks or None)"""

    def case(form, ranks, words, masks=None, **more):
        given = more.pop("rules", ()) + (() if masks else ("--mask", words))
        return decode.Case(form, ranks, more=given, **{"context": (90, 0, 41), **more}), words, masks

    mha = {"heads": 4, "key_heads": 4, "value_heads": 4}
    return [
        case("sequence", 1, STREAM, context=(400,)),
        case("sequence", 3, S2, heads=6, key_heads=3, value_heads=3, dtype="bf16", context=(250,)),
        case("sequence", 4, DUO_WORDS, DUO, new=3, twice=True),
        case("sequence", 8, "window:9,0"),
        case("tree", 5, "dilated:6,0,3", new=3),
        case("tree", 2, "span:beta=0.25,sink=2,least=4,unit=2", dtype="bf16"),
        case("heads", 4, S2, **mha),
        case("tree", 3, S2, rules=("--alibi", "auto", "--relative-bias", "BIAS"), heads=6, key_heads=3, value_heads=3),
        case("heads", 7, "causal@0-1;window:5,0@2-3", **mha),
        case("helix", 4, S2, mesh=(2, 2), **mha),
    ]


class Bench(decode.Bench):
    def __init__(self, start, scratch):
        super().__init__(start, scratch)
        self.masks = {}  # by case: words, file

    def words(self, case, folder):
        words = super().words(case, folder)
        masks = self.masks[case][1]
        if masks is None:
            return words
        file = self.scratch / f"masks{case.ranks}.json"  # beside the folder, which holds outputs only
        file.write_text(json.dumps(masks))
        return words + ["--head-masks", str(file)]

    def allowed(self, case, tokens):
        words = self.masks[case][0]
        seen = oracle.allowed(words, case.new, tokens, case.heads, case.key_heads)
        return seen & oracle.allowed("causal", case.new, tokens, case.heads)

    def judge_heads(self, case, o, lse):
        rounds = oracle.bfloat16 if case.dtype == "bf16" else lambda x: x
        q, k, v = (rounds(x) for x in self.arrays(case))
        first, want = 0, []
        for tokens in case.capacity():
            here, queries = slice(first, first + tokens), slice(first + tokens - case.new, first + tokens)
            mask = self.allowed(case, tokens)
            want.append(oracle.attention(q[queries], k[here], v[here], mask, case.rules()))
            first += tokens
        want, want_lse = (numpy.concatenate(of_all) for of_all in zip(*want))
        error, lse_error = oracle.errors(o, lse, want, want_lse)
        require(error <= BOUND[case.dtype], f"O is {error:.3g} off")
        require(lse_error <= decode.LSE_BOUND, f"LSE is {lse_error:.3g} off")

    def judge_report(self, case, report):
        require(report["check"]["passed"] is True, f"check: {report['check']}")
        owner, seen = [], []
        first = 0
        for tokens in case.capacity():
            seen.append(self.allowed(case, tokens).any(axis=1))  # [heads, tokens]
            owner.append(numpy.arange(first, first + tokens) % case.ranks)
            first += tokens
        owner, seen = numpy.concatenate(owner), numpy.concatenate(seen, axis=1)
        kept = seen.reshape(case.key_heads, -1, seen.shape[1]).any(axis=1)
        found = numpy.array(report["kv_tokens"])
        columns = decode.mesh_of(case)[1]
        want = numpy.zeros_like(found)
        for rank in range(case.ranks):  # a row of ranks has the tokens of all of them, a column its heads
            own = owner // columns == rank // columns
            mine = [[] for _ in range(case.key_heads)]
            for head in decode.even_part(case.heads, columns, rank % columns):
                mine[head * case.key_heads // case.heads].append(head)
            want[rank] = [(seen[heads].any(axis=0) & own).sum() for heads in mine]
        require((found == want).all(), f"tokens kept are {found.tolist()}, not {want.tolist()}")
        width = (case.d_qk + case.d_v) * case.element()
        require(report["kv_bytes"] == found.sum() * width, f"{report['kv_bytes']} bytes, not {found.sum() * width}")
        require(report["kv_bytes_rank"] == found.sum(axis=1).max() * width, "bytes of the rank that keeps most")
        require(report["kv_bytes"] <= report["kv_bytes_held"], "holds less than it keeps")
        if case.context == (400,):  # StreamingLLM's figure
            require((found == 23).all(), f"keeps {found.tolist()} tokens, not the sink's 3 and 20 recent ones")
        if case.context == (250,):  # S2's: L b + S / V, and what is cut off at both ends
            tokens = case.capacity()[0]
            require((kept.sum(axis=1) <= 2 * 4 + math.ceil(tokens / 3) + 4).all(), f"keeps {kept.sum(axis=1)} tokens")
        sent = report["bytes_step"], report["messages_step"]
        require(sent == decode.traffic(case), "masks changed what a step sends")


def main(arguments):
    only, start = jobs.asked(arguments, __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(start, pathlib.Path(scratch))
        for case, words, masks in cases():
            bench.masks[case] = words, masks
        work = [(case.text(), functools.partial(bench.judge, case)) for case in bench.masks]
        sys.exit(1 if end_to_end.judge_all(work, only) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
