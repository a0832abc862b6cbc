"""Several hosts on one machine, for tests of jobs over a network.

    import cluster
    cluster.contain()                                  # once, before threads and temporary files
    with cluster.Cluster(2, mbit=1000, delay_us=100) as hosts:
        done = hosts.run("host0", ["mpirun", "-H", "host0:2,host1:2", ...])
        hosts.cut("host1")

A host is a process that has namespaces of its own: network (addresses 10.77.0.1, .2, ...), host
name, System V and POSIX shared memory, and mounts: /tmp and /dev/shm are its own, the rest of the
file system is shared, as on a real cluster. Its cable goes to cluster_switch. mpirun reaches other
hosts through `agent`, and takes them for what they seem.

All of it lies within one process namespace, where no other job can see or meet it; when its first
process dies, however it dies, the kernel ends all others and takes devices, mounts and names back.
So there is nothing to collide with and nothing to clean up. Needs root, or user namespaces.
"""

import ctypes
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

SKIPPED = 77
CHECKOUT = pathlib.Path(__file__).resolve().parent.parent.parent
NEEDED = ("ip", "nsenter", "taskset", "mpirun")

# <sched.h>, <sys/mount.h>, <sys/prctl.h>
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


class NoCluster(Exception):
    """Why this machine can have no such hosts."""


def _call(function, *arguments):
    if function(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mount(source, target, kind=None, flags=0):
    encode = lambda text: None if text is None else os.fsencode(text)
    _call(libc.mount, encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), None)


def _die_with_parent():
    _call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)


def _become_root_of_own():
    """Root in a new user namespace, which maps to the user outside."""
    user, group = os.geteuid(), os.getegid()
    _call(libc.unshare, NEWUSER)
    pathlib.Path("/proc/self/setgroups").write_text("deny")
    pathlib.Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    pathlib.Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def contain():
    """Goes on in a process namespace of its own, in which everything ends with the caller.

    The process that was there before waits, and ends with the caller's exit code, or SKIPPED where
    this machine has no namespaces to give. SIGTERM and SIGHUP end everything; SIGINT, which the
    terminal has sent to all, does after ten seconds.
    """
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    try:
        if missing:
            raise NoCluster(f"{missing[0]} is not found; install iproute2, util-linux and Open MPI")
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            raise NoCluster("/dev/net/tun cannot be opened: this kernel or container has no TAP devices for us")
        try:
            if os.geteuid() != 0:
                _become_root_of_own()
            _call(libc.unshare, NEWPID | NEWNS | NEWNET)  # a network of its own: cluster_switch may come back to it
            _mount(None, "/", flags=MS_REC | MS_PRIVATE)
        except OSError as error:
            raise NoCluster(f"no namespaces can be made here ({error.strerror}); run as root") from None
    except NoCluster as error:
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        sys.exit(SKIPPED)
    first = os.fork()
    if first == 0:
        _die_with_parent()
        _mount("proc", "/proc", "proc")
        caller = os.fork()
        if caller == 0:
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:  # orphans come here
            pid, status = os.wait()
            if pid == caller:
                os._exit(_exit_code(status))

    def end_all(number, _):
        os.kill(first, signal.SIGKILL)
        os._exit(130 if number == signal.SIGALRM else 128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end_all)
    signal.signal(signal.SIGINT, lambda *_: signal.alarm(10))
    os._exit(_exit_code(os.waitpid(first, 0)[1]))


def _exit_code(status):
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def switch_program():
    """cluster_switch of the newest build of this checkout."""
    built = sorted(CHECKOUT.glob("build/*/tests/cluster/cluster_switch"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise NoCluster("cluster_switch is not built; say cmake --build --preset release --target cluster_switch")
    return built[-1]


class Cluster:
    """`count` hosts host0, host1, ...; `mbit` a second (0: no limit) and `delay_us` one way.

    `shared` are folders that all hosts see although they lie in /tmp or /dev/shm; the current one
    and this checkout always are. Hosts share the cpus evenly: each has its own where there are
    enough, else they take turns.
    """

    def __init__(self, count, mbit=0, delay_us=0, shared=()):
        self.names = [f"host{i}" for i in range(count)]
        self.mbit, self.delay_us = mbit, delay_us
        self.shared = {os.path.realpath(path) for path in (os.getcwd(), CHECKOUT, *shared)}
        if self.shared & {"/tmp", "/dev/shm"}:
            raise NoCluster("hosts share neither /tmp nor /dev/shm; go to another folder")
        cpus = sorted(os.sched_getaffinity(0))
        share = max(1, len(cpus) // count)
        self.cpus = [[cpus[(i * share + j) % len(cpus)] for j in range(share)] for i in range(count)]
        self.pids = []
        self.switch = None

    def __enter__(self):
        try:
            with tempfile.NamedTemporaryFile("w", prefix="hosts") as table:
                table.write("127.0.0.1 localhost\n")
                table.writelines(f"{self.address(name)} {name}\n" for name in self.names)
                table.flush()
                os.chmod(table.name, 0o644)
                for name in self.names:
                    self.pids.append(self._start_host(name, table.name))
            self.switch = subprocess.Popen(
                [switch_program(), str(self.mbit), str(self.delay_us), *map(str, self.pids)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if self.switch.stdout.readline() != "ready\n":
                raise NoCluster("cluster_switch did not start")
            for name in self.names:
                for words in ("link set lo up", f"addr add {self.address(name)}/24 dev eth0", "link set eth0 up"):
                    self.call(name, ["ip", *words.split()], check=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names[:len(self.pids)]:
            for pid in self.processes(name):
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.pids = []
        if self.switch is not None:
            self.switch.stdin.close()
            self.switch.wait()
            self.switch.stdout.close()
            self.switch = None

    def address(self, name):
        return f"10.77.0.{self.names.index(name) + 1}"

    def slots(self, each):
        """What mpirun -H wants for `each` ranks on each host."""
        return ",".join(f"{name}:{each}" for name in self.names)

    def environment(self):
        """What a command on a host needs, so that mpirun finds the others and keeps to the cables."""
        entries = zip(self.names, self.pids, self.cpus)
        return {
            "CLUSTER_HOSTS": " ".join(f"{name}:{pid}:{','.join(map(str, cpus))}" for name, pid, cpus in entries),
            "OMPI_MCA_plm": "rsh",
            "OMPI_MCA_plm_rsh_agent": str(CHECKOUT / "tests/cluster/agent"),
            "OMPI_MCA_pml": "ob1",  # UCX and OFI know other ways
            "OMPI_MCA_btl": "tcp,vader,self",
            # Open MPI takes each host for the whole machine, and would bind all to its first cores.
            "OMPI_MCA_hwloc_base_binding_policy": "none",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def start(self, name, line, environment=None, **more):
        """Popen of `line` on a host, in the current folder."""
        i = self.names.index(name)
        enter = ["nsenter", "--target", str(self.pids[i]), "--mount", "--uts", "--ipc", "--net",
                 "taskset", "--cpu-list", ",".join(map(str, self.cpus[i])),
                 "env", "-C", os.getcwd()]
        inherited = dict(os.environ)
        inherited.pop("OPENBLAS_CORETYPE", None)  # NumPy's; other hosts' ranks do not get it, and round otherwise
        return subprocess.Popen([*enter, *map(str, line)],
                                env={**inherited, **self.environment(), **(environment or {})}, **more)

    def call(self, name, line, environment=None, timeout=120, check=False):
        """Runs `line` on a host to its end; kills all that the host runs past `timeout`."""
        process = self.start(name, line, environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\n(killed: no end after {timeout} s)"
        if check and process.returncode != 0:
            raise NoCluster(f"{' '.join(line)} on {name}: {err.strip()}")
        return subprocess.CompletedProcess(line, process.returncode, out, err)

    def processes(self, name):
        """The pids of what runs on a host now."""
        holder = self.pids[self.names.index(name)]
        mine = os.readlink(f"/proc/{holder}/ns/net")
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and int(entry) != holder and os.readlink(f"/proc/{entry}/ns/net") == mine:
                    found.append(int(entry))
            except OSError:  # it has just ended
                pass
        return found

    def files(self, name):
        """What lies in a host's own /tmp and /dev/shm."""
        listed = self.call(name, ["find", "/tmp", "/dev/shm", "-xdev", "-mindepth", "1"], check=True).stdout
        return {path for path in listed.splitlines() if not any(kept.startswith(path) for kept in self.shared)}

    def cut(self, name):
        """Pulls the cable: frames get lost, and nobody is told."""
        self._order(f"cut {self.names.index(name)}")

    def heal(self, name):
        self._order(f"heal {self.names.index(name)}")

    def _order(self, line):
        print(line, file=self.switch.stdin, flush=True)
        if self.switch.stdout.readline() != "ok\n":
            raise RuntimeError(f"cluster_switch did not obey '{line}'")

    def _start_host(self, name, table):
        """Forks the process that holds a host's namespaces."""
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _die_with_parent()
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, meant for a command
                _call(libc.unshare, NEWNET | NEWUTS | NEWNS | NEWIPC)
                socket.sethostname(name)
                _mount(table, "/etc/hosts", flags=MS_BIND)
                self._own_folders()
                pathlib.Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
                # BBR, where it is the default, paces by timers; a namespace may always have reno.
                pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")
                os.write(tell, b"y")
            except OSError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os.closerange(0, 1024)
            while True:
                signal.pause()
        os.close(tell)
        with open(ready, "rb") as pipe:
            if pipe.read(1) != b"y":
                os.waitpid(pid, 0)
                raise NoCluster(f"no namespaces for {name}")
        return pid

    def _own_folders(self):
        """/tmp and /dev/shm of this host alone, and in them the folders that all share."""
        kept = {path: os.open(path, os.O_PATH) for path in self.shared}
        for own in ("/tmp", "/dev/shm"):
            _mount("tmpfs", own, "tmpfs")
            os.chmod(own, 0o1777)
            for path in kept:
                if path.startswith(own + "/"):
                    os.makedirs(path, exist_ok=True)
                    _mount(f"/proc/self/fd/{kept[path]}", path, flags=MS_BIND | MS_REC)
        for descriptor in kept.values():
            os.close(descriptor)
