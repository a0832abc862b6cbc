"""Ranks that share hosts, pretended by --hosts, and `dattn machine` and its file.

    hosts.py DATTN MPIRUN...
"""

import copy
import json
import pathlib
import sys
import tempfile

import jobs
from jobs import Failed, ran, refused, want

PROBLEM = "--tokens 256 --heads 4 --kv-heads 2 --head-dim 16 --threads 1".split()


def machine_and_its_file(starter, folder):
    path = folder / "machine.json"
    done = ran(starter, ["machine", "--hosts", "2x1", "--threads", "1", "--out", str(path)], 2)
    measured = json.loads(path.read_text())
    want(measured["inside"] is None, "one rank a host has no link inside it")
    link = measured["between"]
    want(link["latency"] > 0 and link["bandwidth"] > 0 and 0 <= link["overlap"] <= 1, str(link))
    for words in ["between hosts", "bf16", "f4", "f8", "portable", "in use"]:
        want(words in done.stdout, f"no {words} in {done.stdout}")
    # On one host, and to standard output.
    alone = ran(starter, ["machine", "--threads", "1", "--out", "-"], 2)
    inside = json.loads(alone.stdout)
    want(inside["between"] is None and inside["inside"]["bandwidth"] > 0, alone.stdout)

    # What plan prices is what the file says, by type; run takes it too, and measures nothing.
    plan = ["plan", "--ranks", "4", "--hosts", "2x2", *PROBLEM[:-2], "--machine", str(path), "--json", "-"]
    for dtype in ["f4", "bf16"]:
        report = json.loads(ran(starter, [*plan, "--dtype", dtype]).stdout)
        said = dict(part.split("=") for part in report["machine"].split(","))
        kernel = next(k for k in measured["kernels"] if (k["isa"], k["dtype"]) == (measured["isa"], dtype))
        pairs = {"rate": kernel["rate"], "backward_rate": kernel["backward_rate"],
                 "net_bandwidth": link["bandwidth"], "net_latency": link["latency"]}
        for name, value in pairs.items():
            want(abs(float(said[name]) - value) <= 0.01 * value, f"{name}: {said[name]}, not {value}")
        want(measured["name"] in report["machine_name"], report["machine_name"])
    run = ran(starter, ["run", *PROBLEM, "--machine", str(path), "--hosts", "2x1"], 2)
    want(measured["name"] in run.stdout.split("forecasts:")[1].splitlines()[0], run.stdout)
    return measured


def bad_files(starter, folder, good):
    def changed(change):
        j = copy.deepcopy(good)
        change(j)
        return json.dumps(j)

    texts = {
        "empty": "",
        "cut": json.dumps(good)[:-20],
        "list": "[]",
        "nested": "[" * 100000,
        "other": json.dumps({"version": 1, "command": "plan"}),
        "version": changed(lambda j: j.update(version=2)),
        "no link": changed(lambda j: j.pop("between")),
        "negative": changed(lambda j: j["between"].update(latency=-1)),
        "tiny": changed(lambda j: j["kernels"][0].update(rate=1e-300)),
        "zero": changed(lambda j: j["between"].update(bandwidth=0)),
        "word": changed(lambda j: j["kernels"][0].update(rate="fast")),
        "huge": json.dumps(good).replace('"ranks": 2', '"ranks": 1e300'),
        "no type": changed(lambda j: j.update(kernels=[k for k in j["kernels"] if k["dtype"] != "f4"])),
        "kernels": changed(lambda j: j.update(kernels={})),
    }
    plan = ["plan", "--ranks", "2", *PROBLEM[:-2], "--machine"]
    for name, text in texts.items():
        path = folder / f"bad {name}.json"
        path.write_text(text)
        refused(starter, [*plan, str(path)], 3, "--machine")
    refused(starter, [*plan, str(folder)], 3, "--machine")
    refused(starter, [*plan, "speed"], 2, "nor a file")
    refused(starter, ["run", *PROBLEM, "--machine", str(folder / "bad list.json")], 3, "--machine", 2)


def pretended_hosts(starter, folder):
    def run(hosts, *more, ranks=4):
        out, lse = folder / f"o{hosts}.npy", folder / f"lse{hosts}.npy"
        done = ran(starter, ["run", *PROBLEM, "--hosts", hosts, "--out", str(out), "--lse", str(lse),
                             "--check", "--json", "-", *more], ranks)
        return json.loads(done.stdout), out.read_bytes() + lse.read_bytes()

    gather = ["--strategy", "gather", "--partition", "contiguous", "--grad", "random"]
    kv = 64 * 2 * 32 * 4  # bytes that a rank of 4 owns
    flat, bits = run("1", *gather)
    want(flat["bytes_between_hosts"] == 0, str(flat["host_links"]))
    for hosts, between in [("2x2", 4 * kv), ("3+1", 4 * kv), ("0,1,1,0", 4 * kv), ("4x1", 12 * kv)]:
        report, same = run(hosts, *gather)
        want(same == bits, f"{hosts}: other bits of O or LSE than on one host")
        want(report["bytes_between_hosts"] == between, f"{hosts}: {report['host_links']}, not {between}")
        want(report["backward"]["bytes_between_hosts"] == 2 * between, f"{hosts}: backward")
        want(report["bytes_sent"] == report["planned_bytes_sent"], f"{hosts}: sent other than planned")
        want(report["check"]["passed"] and report["backward"]["check"]["passed"], f"{hosts}: check")
        want(report["hosts"]["relays"], f"{hosts}: relays, not asked")
    # To each rank of the other host by itself.
    report, same = run("2x2", *gather, "--relay", "off")
    want(same == bits, "without relays: other bits of O or LSE than on one host")
    want(report["bytes_between_hosts"] == 8 * kv, f"without relays: {report['host_links']}, not {8 * kv}")
    want(not report["hosts"]["relays"] and report["backward"]["check"]["passed"], "without relays")
    # What the forecast chose has a word.
    chosen, bits = run("3+1")
    again, same = run("3+1", "--strategy", chosen["strategy"], "--partition", chosen["partition"], "--mesh", chosen["mesh"],
                      "--relay", "on" if chosen["hosts"]["relays"] else "off", "--prefetch", str(chosen["prefetch"]))
    want(same == bits and again["bytes_sent"] == chosen["bytes_sent"], f"{chosen['bytes_sent']}, {again['bytes_sent']}")
    # An all-reduce of O (16 numbers and m, l) and of dQ; the Stats go to each other host once.
    tree = ["--strategy", "tree", "--grad", "random"]
    rows = 256 * 4 * 4  # bytes of a number a row and head
    for hosts, count in [("3+1", 2), ("0,1,1,2", 3)]:
        report, bits = run(hosts, *tree)
        want(report["bytes_between_hosts"] == 2 * (count - 1) * rows * 18, f"{hosts}: {report['host_links']}")
        want(report["backward"]["bytes_between_hosts"] == (count - 1) * rows * (2 * 16 + 2), f"{hosts}: backward")
        want(report["bytes_sent"] == report["planned_bytes_sent"], f"{hosts}: sent other than planned")
        want(report["check"]["passed"] and report["backward"]["check"]["passed"], f"{hosts}: check")
    want(run("0,1,1,2", *tree)[1] == bits, "tree: a second run gave other bits")
    # What is found is that all share this machine.
    found = json.loads(ran(starter, ["run", *PROBLEM, "--json", "-"], 4).stdout)
    want(found["hosts"]["count"] == 1, str(found["hosts"]))
    # The mesh follows the hosts, unless the user says another or they are ragged.
    for hosts, mesh, more in [("2x2", "2x2", []), ("4x1", "2x2", []), ("2x2", "4x1", ["--mesh", "4x1"])]:
        report, _ = run(hosts, "--strategy", "double_ring", *more)
        want(report["mesh"] == mesh and report["check"]["passed"], f"{hosts}: {report['mesh']}")


def bad_hosts(starter):
    for words in ["2x3", "5", "2+1", "0,1", "x", "-1", "2x2\n"]:
        refused(starter, ["plan", "--ranks", "4", *PROBLEM[:-2], "--hosts", words], 2, "--hosts")
    refused(starter, ["run", *PROBLEM, "--hosts", "2x2"], 2, "--hosts", 2)
    refused(starter, ["machine", "--hosts", "3"], 2, "--hosts", 2)
    refused(starter, ["machine", "--out", "/no/such/folder/m.json"], 5, "/no/such/folder", 2)
    one, other = (["run", *PROBLEM, "--hosts", words] for words in ["2x1", "1"])
    line = [*starter.line(one, 1), ":", "-np", "1", *starter.line(other)]
    done = starter.run_line(line)
    want(done.returncode == 2 and "--hosts" in done.stderr, f"{done.returncode}: {done.stderr}")


def main():
    _, starter = jobs.asked(sys.argv[1:], __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            measured = machine_and_its_file(starter, folder)
            bad_files(starter, folder, measured)
            pretended_hosts(starter, folder)
            bad_hosts(starter)
        except Failed as failed:
            sys.exit(f"FAILED: {failed}")
    print("all as they should be")


main()
