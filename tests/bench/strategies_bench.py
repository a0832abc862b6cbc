"""Runs bench_strategies and plot.py on tiny problems and reads all that they write.

    strategies_bench.py BENCH PLOT MPIRUN...
"""

import csv
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

PASSES = ["forward", "backward", "forward+backward"]
SVG = "{http://www.w3.org/2000/svg}"


def run(line, code=0):
    """stdout and stderr of a command, which has to end with `code`."""
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)


def check_agreement(rows, text):
    """CSV says what JSON says."""
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == len(rows) > 0
    for row, line in zip(rows, lines):
        assert list(row) == list(line)
        for name, value in row.items():
            if value is None:
                assert line[name] == "", name
            elif isinstance(value, str):
                assert line[name] == value, name
            else:
                assert float(line[name]) == value, name


def check_rows(rows, ranks, tokens, heads, d):
    """Every strategy has either all passes or one refusal, and figures that fit together."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    assert {"local", "ring", "gather", "ulysses"} <= set(strategies), strategies
    for p in ranks:
        for strategy in strategies:
            mine = [row for row in rows if row["strategy"] == strategy and row["ranks"] == p]
            if mine[0]["refused"] is not None:
                assert len(mine) == 1 and mine[0]["seconds"] is None, mine
            else:
                assert [row["pass"] for row in mine] == PASSES, mine
    ran = [row for row in rows if row["refused"] is None]
    # All heads see the same here, which mixed refuses, and nothing else does.
    assert all(row["refused"] for row in rows if row["strategy"] == "mixed")
    assert {row["strategy"] for row in ran if row["ranks"] == 1} == set(strategies) - {"mixed"}
    assert all(row["ranks"] == 1 for row in ran if row["strategy"] == "local")
    pairs = heads * tokens * (tokens + 1) / 2  # causal
    operations = dict(zip(PASSES, (4 * d, 10 * d, 14 * d)))
    for row in ran:
        assert (row["tokens"], row["heads"], row["d"], row["repeats"]) == (tokens, heads, d, 3)
        assert close(row["gflops"] * row["seconds"] * 1e9, pairs * operations[row["pass"]]), row
        phases = row["compute_seconds"] + row["exposed_seconds"] + row["other_seconds"]
        assert close(phases, row["seconds"]), row
        assert close(row["efficiency"] * row["ranks"], row["speedup"]), row
        assert row["of_ideal_busy"] > 0 and row["of_ideal_alone"] > 0, row
        assert row["forecast_over_measured"] > 0 and row["plan_memory_bytes"] > 0, row
        assert (row["bytes_per_rank"] > 0) == (row["messages"] > 0) == (row["ranks"] > 1), row


def check_drawing(file, words):
    """Well-formed, with these words in it, and nothing drawn outside."""
    root = xml.parse(file).getroot()
    assert root.tag == SVG + "svg"
    width, height = float(root.get("width")), float(root.get("height"))
    texts = {element.text for element in root.iter(SVG + "text")}
    assert set(words) <= texts, (file, set(words) - texts)
    for element in root.iter():
        places = [element.get(name) for name in ("x", "x1", "x2", "cx")]
        heights = [element.get(name) for name in ("y", "y1", "y2", "cy")]
        for point in (element.get("points") or "").split():
            places.append(point.split(",")[0])
            heights.append(point.split(",")[1])
        for values, limit in ((places, width), (heights, height)):
            assert all(0 <= float(v) <= limit for v in values if v is not None), (file, element.attrib)


def main():
    bench, plot, *mpirun = sys.argv[1:]

    def job(ranks, words, code=0):
        return run([*mpirun, "-np", str(ranks), bench, *words.split()], code)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        files = f"--json {folder}/r.json --csv {folder}/r.csv"
        tiny = "--heads 6 --kv-heads 3 --head-dim 8 --pass both"
        out, _ = job(3, f"--tokens 97 --mask causal {tiny} --ranks 1,2,3 --repeat 3 {files}")
        assert "ulysses" in out and "refused: runs on one rank" in out, out
        report = json.loads((folder / "r.json").read_text())
        assert report["scaling"] == "strong" and list(report["machines"]) == ["1", "2", "3"]
        check_rows(report["rows"], (1, 2, 3), tokens=97, heads=6, d=8)
        check_agreement(report["rows"], (folder / "r.csv").read_text())

        for source in ("json", "csv"):
            run([sys.executable, plot, f"{folder}/r.{source}", "--out", f"{folder}/{source}"])
        for drawing in ("scaling", "efficiency", "phases"):
            check_drawing(folder / "json" / f"{drawing}.svg", PASSES)
            same = [(folder / source / f"{drawing}.svg").read_text() for source in ("json", "csv")]
            assert same[0] == same[1], drawing

        # Weak scaling: tokens grow with the ranks, and with them the same documents.
        out, _ = job(2, "--tokens-per-rank 40 --packed 9 --strategies ring,gather --repeat 1 --csv")
        rows = list(csv.DictReader(out.splitlines()))
        assert [(row["ranks"], row["tokens"]) for row in rows] == [("1", "40")] * 2 + [("2", "80")] * 2
        lengths = [[int(n) for n in re.findall(r"\d+", row["mask"])] for row in rows[1:3]]
        assert [sum(n) for n in lengths] == [40, 80] and lengths[0][:-1] == lengths[1][:len(lengths[0]) - 1]

        # A little memory: first nothing fits, then no ideal, then one strategy at a time.
        few = f"--tokens 97 {tiny} --partition contiguous --ranks 2 --repeat 1 {files}"
        job(2, f"{few} --memory 1")
        rows = json.loads((folder / "r.json").read_text())["rows"]
        needs = [re.match(r"needs ([0-9.]+) (B|KiB|MiB) a rank", row["refused"]) for row in rows]
        units = {"B": 1, "KiB": 1024, "MiB": 1 << 20}
        most = max(float(need[1]) * units[need[2]] for need in needs if need)
        for share, says, ideal in ((1.1, "the ideal is left out", False), (3, "in turn", True)):
            job(2, f"{few} --memory {int(share * most)}")
            report = json.loads((folder / "r.json").read_text())
            assert any(says in note for note in report["notes"]), report["notes"]
            ran = [row for row in report["rows"] if row["refused"] is None]
            assert len(ran) >= 9 and all((row["of_ideal_busy"] is not None) == ideal for row in ran)

        # Few queries, in double.
        out, _ = job(3, "--tokens 64 --queries 2 --heads 2 --head-dim 4 --dtype f8 --repeat 1 --ranks 3 --csv")
        assert any(row["strategy"] == "tree" and not row["refused"] for row in csv.DictReader(out.splitlines()))

        for words, says in (("--tokens 64 --ranks 3", "--ranks"),
                            ("--tokens 64 --ranks 1,,2", "--ranks"),
                            ("--tokens 64 --strategies rang", "--strategies"),
                            ("--tokens 64 --tokens-per-rank 8", "--tokens-per-rank"),
                            ("--tokens 64 --scaling weak", "--scaling"),
                            ("--tokens 64 --packed 4 --mask full", "--packed"),
                            ("--tokens 64 --csv --json", "--csv"),
                            ("", "--tokens")):
            out, err = job(2, words, code=2)
            assert out == "" and re.match(r"\[rank 0\] bench_strategies: .*" + says, err), (words, err)
    print("bench_strategies and plot.py: all good")


if __name__ == "__main__":
    main()
