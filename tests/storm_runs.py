"""Shared by the mishaps of storm.py: scripts that something happens to, and their end."""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conftest import byte_tokenizer, tiny_llama, write_pairs  # noqa: E402
from processes import Outcome, run_ranks  # noqa: E402
from trainings import metrics_of  # noqa: E402

import evaluate  # noqa: E402
import train_dpo  # noqa: E402
import train_rm  # noqa: E402
from nanoalign.data.template_limits import memory_in_use  # noqa: E402
from nanoalign.distributed import environment_ranks, run  # noqa: E402
from nanoalign.evaluation import plots  # noqa: E402
from nanoalign.ranks.report import report  # noqa: E402

SECONDS = 60
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")  # audit events
SCRIPTS = {"train_dpo.py": train_dpo, "train_rm.py": train_rm, "evaluate.py": evaluate}


# --- processes ------------------------------------------------------------------------------------


def script(name: str, argv: list[str], *before: tuple) -> None:
    """A script as a user starts it, without pictures. before: (function, *arguments) to call."""
    sys.argv = [name, *argv]
    os.sched_getaffinity = lambda pid: {0}  # one thread, however many ranks a host has
    module = SCRIPTS[name]
    if name != "evaluate.py":
        module.result.finish = lambda *args: None
    for function, *arguments in before:
        function(*arguments)
    run(module.main, report)
    sys.stdout.flush()
    os._exit(0)  # as a process that ends: what follows here is of the tests


def kill_at(count: int, folder: str, rank: int) -> None:
    """kill -9 before the `count`-th operation on a file of a folder, on one rank."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in FILES and isinstance(args[0], str | os.PathLike):
            seen += str(args[0]).startswith(folder)
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    if environment_ranks()[0] == rank:
        sys.addaudithook(hook)


def signal_after(seconds: float, number: int, rank: int) -> None:
    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    if environment_ranks()[0] == rank:
        threading.Thread(target=send, daemon=True).start()


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_memory(more: int) -> None:
    """Lets the process take `more` bytes beside those that it has."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_in_use() + more, resource.RLIM_INFINITY))


def no_pictures() -> None:
    def write(path: Path, *rest: object) -> None:
        Path(path).write_bytes(b"\x89PNG")

    plots.policy_picture = plots.reward_picture = write


def start(name: str, argv: Iterable[object], *before: tuple, ranks: int = 1) -> Outcome:
    """Runs a script to its end. before: as in `script`."""
    return run_ranks(ranks, script, name, list(map(str, argv)), *before, timeout=SECONDS)


def train(argv: Iterable[object], ranks: int = 1, *before: tuple) -> Outcome:
    return start("train_dpo.py", argv, *before, ranks=ranks)


def not_refused(outcome: Outcome, words: str = "") -> str | None:
    """What is wrong unless a script ended with one line of error, with one of words a|b."""
    if problem := bad_ending(outcome, (1,)):
        return problem
    has_words = any(word in outcome.stderr for word in words.split("|"))
    return None if has_words else f"another error: {outcome.stderr[-200:]!r}"


def bad_ending(outcome: Outcome, allowed: tuple[int, ...] = (0, 1)) -> str | None:
    """What is wrong with the end of a script whose input may be bad; None if nothing is."""
    # Negative: by a signal. 255: multiprocessing's server of forks has lost the code.
    codes = {1 if code == 255 else code for code in outcome.codes}
    text = outcome.stderr + outcome.stdout
    if "Traceback" in text:
        return f"traceback: {outcome.stderr.strip().splitlines()[-1][:200]}"
    if not codes <= set(allowed):
        return f"exit codes {outcome.codes}: {outcome.stderr[-200:]}"
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    if 1 in codes and len(errors) != 1:
        return f"{len(errors)} errors: {outcome.stderr[-200:]!r}"
    if errors and len(errors[0]) > 2000:
        return f"an error of {len(errors[0])} characters"
    controls = {c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t\r"}
    return f"controls {controls} on the terminal" if controls else None


# --- the world of a storm -------------------------------------------------------------------------


class World:
    """A model, pairs, and undisturbed runs on one and two ranks."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.pairs = folder, folder / "model", folder / "pairs.jsonl"
        tiny_llama().save_pretrained(self.model)
        byte_tokenizer().save_pretrained(self.model)
        write_pairs(self.pairs, 25)
        self.chat, pair = folder / "chat.jsonl", {"chosen": "Hi!", "rejected": "No."}
        chat = json.dumps({"prompt": [{"role": "user", "content": "Say hi"}]} | pair)
        self.chat.write_text(8 * f"{chat}\n")
        self.whole = {}
        for ranks in (1, 2):
            out = folder / f"whole{ranks}"
            self.ended(train(self.argv(out), ranks))
            self.whole[ranks] = self.files(out)
        self.written = {"run": folder / "stopped", "cache": folder / "cache"}
        cached = ["--cache", self.written["cache"], "--precompute_reference"]
        for name, flags in (("stopped", ["--stop_after", 4]), ("cached", cached)):
            self.ended(train(self.argv(folder / name, *flags)))
        self.rm, self.scores = folder / "rm", folder / "scores.jsonl"
        self.ended(start("train_rm.py", self.argv(self.rm)))
        self.ended(start("evaluate.py", self.scoring(self.scores)))

    def ended(self, outcome: Outcome) -> None:
        assert set(outcome.codes) == {0}, outcome.stderr

    def argv(self, out: Path, *flags: object) -> list[str]:
        words = ["--model", self.model, "--data", self.pairs, "--out", out, "--batch_size", 7,
                 "--lr", 1e-2, "--template", "raw", "--steps", 6, "--save_every", 2, "--keep", 2,
                 *flags]  # fmt: skip
        return [str(word) for word in words]

    def scoring(self, out: Path) -> list[object]:
        return ["score", "--model", self.rm, "--data", self.pairs, "--out", out]

    def files(self, out: Path) -> tuple[list[dict], bytes]:
        return metrics_of(out), (out / "model.safetensors").read_bytes()

    def wrong(self, out: Path, ranks: int) -> str | None:
        """How a finished run differs from the undisturbed one."""
        lines, weights = self.files(out)
        if lines != self.whole[ranks][0]:
            return "other metrics than those of the undisturbed run"
        return None if weights == self.whole[ranks][1] else "other weights"

    def finish(self, out: Path, ranks: int) -> str | None:
        """Continues a run that was interrupted, or starts it again; how it differs then."""
        steps = list((out / "checkpoints").glob("step_*"))
        flags = ["--resume"] if steps else ["--overwrite"] if (out / "args.json").exists() else []
        outcome = train(self.argv(out, *flags), ranks)
        if outcome.codes != [0] * ranks:
            return f"{flags} ended with {outcome.codes}: {outcome.stderr[-300:]}"
        return self.wrong(out, ranks)


def ranks_of(chance: random.Random) -> int:
    return 2 if chance.random() < 0.25 else 1
