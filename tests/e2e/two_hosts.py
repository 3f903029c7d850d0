"""Two hosts on one machine: each has its own network, host name and address, and a cable joins them.

They are network and UTS namespaces inside a user namespace, which needs no root rights where the kernel allows these.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "tests" / "e2e" / "stand_ins"
NAMES = ("node0", "node1")
_SETUP = """
set -e
mount --bind "$1/hosts" /etc/hosts
for number in 0 1; do
    unshare -nu sh -c "hostname node$number; ip link set lo up; exec sleep infinity" &
    echo $! > "$1/node$number"
done
sleep 0.3
ip link add eth0 netns "$(cat "$1/node0")" type veth peer name eth0 netns "$(cat "$1/node1")"
for number in 0 1; do
    nsenter -t "$(cat "$1/node$number")" -n ip addr add 10.77.0.$((number + 1))/24 dev eth0
    nsenter -t "$(cat "$1/node$number")" -n ip link set eth0 up
done
touch "$1/ready"
wait
"""


def available() -> bool:
    """Whether this machine allows such namespaces."""
    command = ["unshare", "-rnmu", "sh", "-c", "hostname x && ip link add veth0 type veth peer name veth1"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


class TwoHosts:
    """node0 (10.77.0.1) and node1 (10.77.0.2), for a `with` block. Programs named in stand_ins/ are first on the PATH.

    Args:
        folder: for the hosts file and the processes' numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")

    def __enter__(self) -> TwoHosts:
        words = ["unshare", "-rnm", "bash", "-c", _SETUP, "setup", str(self.folder)]
        self._outer = subprocess.Popen(words, start_new_session=True)
        deadline = time.monotonic() + 20
        while not (self.folder / "ready").exists():
            assert self._outer.poll() is None and time.monotonic() < deadline, "the namespaces were not made"
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in NAMES:
            self.power_off(name)
        os.killpg(self._outer.pid, signal.SIGKILL)
        self._outer.wait()

    def start(self, name: str, *words: Any, **environment: str) -> subprocess.Popen[str]:
        """Start a program on a host, in the repository's root and in a process group of its own."""
        enter = ["nsenter", "-t", (self.folder / name).read_text().strip(), "-U", "-m", "-n", "-u"]
        environment = {
            **os.environ,
            "PATH": f"{STAND_INS}:{os.environ['PATH']}",
            "TWO_HOSTS": str(self.folder),
            **environment,
        }
        return subprocess.Popen(
            [*enter, "--preserve-credentials", "env", "-C", str(ROOT), *map(str, words)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def processes(self, name: str) -> list[int]:
        """Numbers of the processes on a host, without the one that keeps its namespaces."""
        keeper = int((self.folder / name).read_text())
        network = os.readlink(f"/proc/{keeper}/ns/net")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns" / "net") == network and int(entry.name) != keeper:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def ranks(self, name: str) -> list[int]:
        """Those of `processes` that train, without their launcher."""
        found = []
        for pid in self.processes(name):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "megacid/train.py" in words[1:3] and "deepspeed" not in words[0]:
                    found.append(pid)
        return found

    def power_off(self, name: str) -> None:
        """Kill all processes of a host at once."""
        while pids := self.processes(name):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def cable(self, state: str) -> None:
        """Pull the cable ("down") or plug it in ("up"). No packet tells either host."""
        for name in NAMES:
            self.start(name, "ip", "link", "set", "eth0", state).communicate(timeout=10)
