"""Whether the hosts of cluster.py are what they claim, and whether nothing stays of them.

    hosts_test.py

Links are held to bounds from one side, which no load can break: a round trip takes at least twice
the delay, and bytes at least as long as the rate allows.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import cluster

HOSTS = [sys.executable, str(pathlib.Path(__file__).parent / "hosts")]
FAILED = []

# A server on host1 that answers "done" to each connection when it has read all.
SERVER = """
import socket
listener = socket.create_server(("10.77.0.2", 7000))
print("ready", flush=True)
while True:
    peer, _ = listener.accept()
    while peer.recv(1 << 20):
        pass
    peer.sendall(b"done")
    peer.close()
"""

# The seconds from connecting to the answer, for argv[1] bytes; or "lost" after argv[2] seconds.
CLIENT = """
import socket, sys, time
began = time.monotonic()
try:
    with socket.create_connection(("host1", 7000), timeout=float(sys.argv[2])) as peer:
        peer.sendall(bytes(int(sys.argv[1])))
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(4) == b"done"
    print(time.monotonic() - began)
except OSError:
    print("lost")
"""


def require(condition, what):
    print("ok   " if condition else "FAIL ", what, flush=True)
    if not condition:
        FAILED.append(what)


def within(seconds, what):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def running(line):
    """Whether a process has this command line."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if pathlib.Path(f"/proc/{entry}/cmdline").read_bytes() == line.encode().replace(b" ", b"\0") + b"\0":
                return True
        except OSError:  # it has just ended
            pass
    return False


def ends_with_its_first_process():
    """Kills the command in the middle, in each way; runs outside of any container."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        # Numbers of seconds that no other process has: the marks of a process on each host.
        marks = [f"sleep 9{os.getpid()}.{number}{host}" for host in (1, 2)]
        agent = cluster.CHECKOUT / "tests/cluster/agent"
        with tempfile.TemporaryFile() as nothing:
            process = subprocess.Popen(
                [*HOSTS, "2", "--", "sh", "-c", f"{agent} host1 '{marks[1]}' & {marks[0]}; :"],
                stdout=nothing, stderr=nothing, start_new_session=True)
            started = within(30, lambda: all(map(running, marks)))
            process.send_signal(number)
            process.wait(30)
        name = signal.Signals(number).name
        require(started, f"two hosts are busy before {name}")
        require(within(10, lambda: not any(map(running, marks))), f"nothing runs after {name}")


def refuses_nonsense():
    for words in ("0", "two", "2 --rate -1", "2 --rate 1e3", "2 --delay", "2 --cut host2@1", "2 --cut host1", "2 3", "2 --del 5"):
        done = subprocess.run([*HOSTS, *words.split()], capture_output=True, text=True, timeout=30, check=False)
        good = done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("hosts: ")
        require(good, f"hosts {words}: {done.returncode}: {done.stderr.strip()}")


def links(hosts):
    server = hosts.start("host1", [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    require(server.stdout.readline() == "ready\n", "a server listens on host1")

    def seconds(size, patience=60.0):
        out = hosts.call("host0", [sys.executable, "-c", CLIENT, str(size), str(patience)]).stdout.strip()
        return None if out == "lost" else float(out)

    # Connecting is a round trip, the bytes and their answer another: four times 20 ms.
    taken = seconds(1)
    require(taken is not None and taken >= 0.080, f"two round trips take at least 80 ms: {taken}")
    taken = seconds(2_000_000)
    require(taken is not None and taken >= 0.160, f"2 MB at 100 Mbit/s take at least 160 ms: {taken}")
    hosts.cut("host1")
    require(seconds(1, 0.5) is None, "nothing passes a cut cable")
    hosts.heal("host1")
    require(seconds(1) is not None, "a healed cable is as before")
    server.kill()
    server.wait()
    server.stdout.close()


def main():
    refuses_nonsense()
    ends_with_its_first_process()
    if FAILED:
        sys.exit(1)
    cluster.contain()
    with cluster.Cluster(2, mbit=100, delay_us=20000) as hosts:
        names = [hosts.call(name, ["hostname"]).stdout.strip() for name in hosts.names]
        require(names == ["host0", "host1"], f"hosts have names: {names}")
        for folder in ("/tmp", "/dev/shm"):
            hosts.call("host0", ["touch", f"{folder}/mine"], check=True)
            require(f"{folder}/mine" in hosts.files("host0") - hosts.files("host1"), f"{folder} is the host's own")
        require(hosts.call("host1", ["ls", __file__]).returncode == 0, "the checkout is everybody's")
        require(hosts.processes("host1") == [], "a host starts with no processes")
        links(hosts)
        reach = hosts.call("host0", ["mpirun", "-H", hosts.slots(1), "-np", "2", "hostname"])
        require(sorted(reach.stdout.split()) == names, f"mpirun reaches all: {reach.stdout}{reach.stderr}")
        left = hosts.start("host1", ["sleep", "1000"])
        require(within(10, lambda: len(hosts.processes("host1")) == 1), "what runs on a host is seen")
    require(left.wait(10) == -signal.SIGKILL, "what runs on a host ends with it")
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
