"""python -m pytest tests/ranks/test_hosts.py      as root, else skipped

Two network namespaces with a virtual link between them, as two hosts that share a disk: torchrun
over both, and a run that continues when one of them is lost.

torchrun's agent is forked from a process that has imported torch, and forks the rank.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import write_pairs
from processes import CONTEXT, run_ranks
from torch.distributed.launcher import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from trainings import assert_same_curve, metrics_of, script, without_picture

from nanoalign.runs import result

TIMEOUT = 5  # seconds, of the run whose link is cut
SLACK = 15  # seconds more until torchrun, too, has ended, on a busy machine
CLONE_NEWNET = 0x40000000  # of setns(2)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def in_namespace(name: str, link: str, stderr: Path, words: list[str], argv: list[str]) -> None:
    """Runs torchrun's agent in a network namespace, with its errors in a file.

    words: of torchrun. argv: of train_dpo.py.
    """
    with open(f"/var/run/netns/{name}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1"}
    config, _, _ = config_from_args(parse_args([*words, "train_dpo.py"]))
    elastic_launch(config, rank)(argv)


def rank(argv: list[str]) -> None:
    """train_dpo.py, which returns where it ends without an error, as the agent expects it."""
    result.finish = lambda *_: None  # the picture takes longer than the training
    end = os._exit
    os._exit = lambda code: end(code) if code else None
    script(argv)
    os._exit = end


class Host:
    """A network namespace with one end of the link, and torchrun in it."""

    def __init__(self, number: int):
        self.number, self.address = number, f"10.213.77.{number + 1}"
        self.name = self.link = f"nano{os.getpid()}h{number}"
        self.process = None

    def start(self, master: "Host", folder: Path, argv: list[str]) -> None:
        words = [
            "--nnodes", "2", "--node_rank", str(self.number), "--nproc_per_node", "1",
            "--master_addr", master.address, "--master_port", "29500",
            "--start_method", "fork",
        ]  # fmt: skip
        self.stderr = folder / f"{self.number}.stderr"
        given = self.name, self.link, self.stderr, words, argv
        self.process = CONTEXT.Process(target=in_namespace, args=given)
        self.process.start()

    def kill(self) -> None:
        """As when the power fails, but that the kernel still closes the connections."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(int(pid), signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

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
                host.process.join()
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
        assert all(host.process.is_alive() for host in hosts), [host.errors() for host in hosts]
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
