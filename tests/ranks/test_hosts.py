"""python -m pytest tests/ranks/test_hosts.py      as root, else skipped

Two network namespaces with a virtual link between them, as two hosts that share a disk: torchrun
over both, and a run that continues when one of them is lost.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import write_pairs
from processes import run_ranks
from trainings import assert_same_curve, metrics_of, without_picture

import train_dpo

TIMEOUT = 5  # seconds, of the run whose link is cut
SLACK = 15  # seconds more until torchrun, too, has ended, on a busy machine


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A network namespace with one end of the link, and torchrun in it."""

    def __init__(self, number: int):
        self.number, self.address = number, f"10.213.77.{number + 1}"
        self.name = self.link = f"nano{os.getpid()}h{number}"
        self.process: subprocess.Popen | None = None

    def start(self, master: "Host", folder: Path, argv: list[str]) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
            "--node_rank", str(self.number), "--nproc_per_node", "1",
            "--master_addr", master.address, "--master_port", "29500", train_dpo.__file__, *argv,
        ]  # fmt: skip
        self.stderr = folder / f"{self.number}.stderr"
        with self.stderr.open("w") as stderr:
            command = ["ip", "netns", "exec", self.name, *command]
            env = os.environ | {"GLOO_SOCKET_IFNAME": self.link, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stderr, env=env
            )

    def kill(self) -> None:
        """As when the power fails, but that the kernel still closes the connections."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(int(pid), signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def errors(self) -> str:
        return self.stderr.read_text()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    hosts = [Host(0), Host(1)]
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
            ip("link", "add", hosts[0].link, "type", "veth", "peer", "name", hosts[1].link)
            for host in hosts:
                ip("link", "set", host.link, "netns", host.name)
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.link)
                for link in ("lo", host.link):
                    ip("-n", host.name, "link", "set", link, "up")
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield hosts
    finally:
        for host in hosts:
            if host.process is not None:
                host.kill()
                host.process.wait()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@pytest.fixture(scope="module")
def flags(llama_folder, tmp_path_factory) -> list[str]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)
    flags = ["--model", llama_folder, "--data", pairs, "--template", "raw", "--batch_size", 7,
             "--lr", 1e-3, "--steps", 30]  # fmt: skip
    return [str(flag) for flag in flags]


def on_one_host(out: Path, argv: list[str]) -> list[dict]:
    outcome = run_ranks(1, without_picture, [*argv, "--out", str(out)])
    assert outcome.codes == [0], outcome.stderr
    return metrics_of(out)


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory) -> list[dict]:
    return on_one_host(tmp_path_factory.mktemp("runs") / "one", flags)


def start(hosts: list[Host], folder: Path, argv: list[str]) -> Path:
    for host in hosts:
        host.start(hosts[0], folder, [*argv, "--out", str(folder / "run")])
    return folder / "run"


def wait_for(path: Path, hosts: list[Host]) -> None:
    while not path.exists():
        assert all(host.process.poll() is None for host in hosts), [host.errors() for host in hosts]
        time.sleep(0.01)


def test_two_hosts_give_the_curve_of_one(hosts, flags, tmp_path):
    four = [*flags, "--steps", "4"]
    out = start(hosts, tmp_path, four)
    assert [host.wait() for host in hosts] == [0, 0], [host.errors() for host in hosts]
    assert_same_curve(on_one_host(tmp_path / "one", four), metrics_of(out))


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_lost_host_ends_the_other_and_the_run_continues(
    hosts, flags, uninterrupted, tmp_path, how
):
    """The host that is killed is the one whose address all ranks were given."""
    out = start(hosts, tmp_path, [*flags, "--save_every", "1", "--timeout", str(TIMEOUT)])
    wait_for(out / "checkpoints" / "step_000002", hosts)
    if how == "killed":
        hosts[0].kill()
        left, limit = hosts[1:], SLACK
    else:
        ip("-n", hosts[0].name, "link", "set", hosts[0].link, "down")
        left, limit = hosts, TIMEOUT + SLACK
    lost = time.monotonic()
    for host in left:
        assert host.wait(lost + limit - time.monotonic()) == 1
        assert host.errors().count("error: ") == 1, host.errors()
        assert f"error: rank {host.number} has lost contact with another rank" in host.errors()
        assert 'train_dpo.py", line' not in host.errors()  # no traceback of a worker
    assert len(metrics_of(out)) < len(uninterrupted)
    assert_same_curve(uninterrupted, on_one_host(out, [*flags, "--resume"]))
