"""A storm of mishaps: what is killed, full, damaged, interrupted or hostile, and what is left then.

    python tests/storm.py                       each kind once or a few times, about a minute
    python tests/storm.py --times 10            about 200 of each kind, half an hour on two cores
    python tests/storm.py kills models --seed 7

Each mishap is a process, or several ranks, forked from a server that has imported everything. It
has survived if the run ends as it should: with the files of an undisturbed run, bit for bit, after
a resume; or with one line that is an error, without a traceback, controls or more than 3,100
characters, within a minute. The table counts what was tried and what has failed, and each failure
is printed with its number, which --only repeats.
"""

import argparse
import functools
import gzip
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import byte_tokenizer, tiny_llama, write_pairs  # noqa: E402
from ranks import Outcome, run_ranks  # noqa: E402

import evaluate  # noqa: E402
import train_dpo  # noqa: E402
import train_rm  # noqa: E402
from nanoalign.distributed import place, run  # noqa: E402
from nanoalign.hosts.report import report  # noqa: E402

SECONDS = 60
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")  # audit events
SCRIPTS = {"train_dpo.py": train_dpo, "train_rm.py": train_rm, "evaluate.py": evaluate}
Mishap = Callable[[random.Random, Path, "World"], str | None]  # what went wrong, if anything did


# --- processes ------------------------------------------------------------------------------------


def script(name: str, argv: list[str], *before: tuple) -> None:
    """A script as a user starts it, without pictures. before: (function, *arguments) to call."""
    sys.argv = [name, *argv]
    module = SCRIPTS[name]
    if name != "evaluate.py":
        module.finish = lambda *args: None
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

    if place()[0] == rank:
        sys.addaudithook(hook)


def signal_after(seconds: float, number: int, rank: int) -> None:
    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    if place()[0] == rank:
        threading.Thread(target=send, daemon=True).start()


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def train(argv: list[str], ranks: int = 1, *before: tuple) -> Outcome:
    return run_ranks(ranks, script, "train_dpo.py", argv, *before, timeout=SECONDS)


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
    if errors and len(errors[0]) > 3100:
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
        self.whole = {}
        for ranks in (1, 2):
            out = folder / f"whole{ranks}"
            outcome = train(self.argv(out), ranks)
            assert outcome.codes == [0] * ranks, outcome.stderr
            self.whole[ranks] = self.files(out)
        self.written = {"run": folder / "stopped", "cache": folder / "cache"}
        cached = ["--cache", self.written["cache"], "--precompute_reference"]
        for name, flags in (("stopped", ["--stop_after", 4]), ("cached", cached)):
            outcome = train(self.argv(folder / name, *flags))
            assert outcome.codes == [0], outcome.stderr
        self.rm = folder / "rm"
        argv = [*self.argv(self.rm)]
        outcome = run_ranks(1, script, "train_rm.py", argv, timeout=SECONDS)
        assert outcome.codes == [0], outcome.stderr

    def argv(self, out: Path, *flags: object) -> list[str]:
        words = ["--model", self.model, "--data", self.pairs, "--out", out, "--batch_size", 7,
                 "--lr", 1e-2, "--template", "raw", "--steps", 6, "--save_every", 2, "--keep", 2,
                 *flags]  # fmt: skip
        return [str(word) for word in words]

    def files(self, out: Path) -> tuple[bytes, bytes]:
        return (out / "metrics.jsonl").read_bytes(), (out / "model.safetensors").read_bytes()

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


# --- kills, full disks, signals, two writers ------------------------------------------------------


def ranks_of(chance: random.Random) -> int:
    return 2 if chance.random() < 0.25 else 1


def kills(chance: random.Random, folder: Path, world: World) -> str | None:
    """kill -9 at a file operation or a moment; in a quarter of the cases again while resuming."""
    out, ranks = folder / "run", ranks_of(chance)
    for flags in ([], ["--resume"]) if chance.random() < 0.25 else ([],):
        if flags and not list((out / "checkpoints").glob("step_*")):
            break
        at = (kill_at, chance.randint(1, 90), str(out), chance.randrange(ranks))
        if chance.random() < 0.3:
            at = (signal_after, chance.uniform(0, 0.8), signal.SIGKILL, chance.randrange(ranks))
        outcome = train(world.argv(out, *flags), ranks, at)
        if "Traceback" in outcome.stderr:
            return f"traceback: {outcome.stderr.strip().splitlines()[-1][:200]}"
    return world.finish(out, ranks)


def full_disks(chance: random.Random, folder: Path, world: World) -> str | None:
    """Files of bounded size: one line, and a run that goes on when there is room."""
    out, ranks = folder / "run", ranks_of(chance)
    size = int(10 ** chance.uniform(2.5, 6))
    flags = [] if chance.random() < 0.5 else ["--save_every", 100]
    outcome = train(world.argv(out, *flags), ranks, (limit_files, size))
    return bad_ending(outcome) or world.finish(out, ranks)


def small_disks(chance: random.Random, folder: Path, world: World) -> str | None:
    """As full_disks, on a tmpfs of few pages (as root, on Linux)."""
    disk, size = folder / "disk", int(10 ** chance.uniform(4.5, 6.5))
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        outcome = train(world.argv(disk / "run"))
        problem = bad_ending(outcome)
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        return problem or world.finish(disk / "run", 1)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def signals(chance: random.Random, folder: Path, world: World) -> str | None:
    """A signal at a moment: 128 + n and one line, or a run that had ended, or not begun."""
    out, ranks = folder / "run", ranks_of(chance)
    number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
    at = (signal_after, chance.uniform(0, 1), number, chance.randrange(ranks))
    outcome = train(world.argv(out), ranks, at)
    allowed = (0, 1, 128 + number, -number)  # the last: before training, by default
    return bad_ending(outcome, allowed) or world.finish(out, ranks)


def torchrun_signals(chance: random.Random, folder: Path, world: World) -> str | None:
    """A signal to torchrun, or kill -9: its ranks end, and the run goes on later."""
    out, log = folder / "run", folder / "log"
    number = chance.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               ROOT / "train_dpo.py", *world.argv(out)]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.5))
    process.send_signal(number)
    process.wait(SECONDS)
    while time.monotonic() < deadline:  # ranks of a killed torchrun end a moment later
        outcome = train(world.argv(out, "--overwrite", "--steps", 1), 2)
        if "is being written by" not in outcome.stderr:
            break
    else:
        return "the ranks did not end"
    shutil.rmtree(out)
    return world.finish(out, 2)


def writers(chance: random.Random, folder: Path, world: World) -> str | None:
    """Two runs into one folder, one of which may resume: one result, and one line of the other."""
    out = folder / "run"
    if flags := chance.choice([[], ["--resume"], ["--overwrite"]]):
        train(world.argv(out, "--stop_after", 4))
    delay = chance.uniform(0, 0.6)

    def late() -> Outcome:
        time.sleep(delay)
        return train(world.argv(out, *flags))

    with ThreadPoolExecutor() as pool:
        both = [pool.submit(train, world.argv(out, *flags)), pool.submit(late)]
    outcomes = [each.result() for each in both]
    for outcome in outcomes:
        if problem := bad_ending(outcome):
            return problem
    if all(outcome.codes != [0] for outcome in outcomes):
        return f"none has ended: {[outcome.stderr[-200:] for outcome in outcomes]}"
    return world.wrong(out, 1)


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def bit_flips(kind: str, chance: random.Random, folder: Path, world: World) -> str | None:
    """One bit of a file that a run has written: an error, or the result of before."""
    where, _, pattern = kind.partition("/")
    base, out, ranks = world.written[where], folder / "run", ranks_of(chance)
    shutil.copytree(base, folder / where)
    found = sorted(path for path in (folder / where).rglob(pattern) if path.is_file())
    found = [path for path in found if "step_000002" not in str(path)]  # the older checkpoint
    flip(chance.choice(found), chance)
    if where == "cache":
        flags = ["--cache", folder / "cache", "--precompute_reference"]
        outcome = train(world.argv(out, *flags))
    else:
        outcome = train(world.argv(out, "--resume"), ranks)
    if problem := bad_ending(outcome):
        return problem
    if set(outcome.codes) == {1}:
        return None
    if where == "cache":
        return same_metrics(out, world)
    return world.wrong(out, 1) if ranks == 1 else None


def same_metrics(out: Path, world: World) -> str | None:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in world.whole[1][0].decode().splitlines()]
    close = [abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(lines, whole, strict=True)
             if "loss" in a]  # fmt: skip
    return None if all(close) else "other metrics"


# --- hostile data ---------------------------------------------------------------------------------


def hostile_record(chance: random.Random) -> str:
    """A line of a .jsonl file."""
    deep = chance.choice([100, 900, 3000, 100_000])
    text = chance.choice(
        [
            "",
            " ",
            "\x1b[2J\x1b]0;x\x07",
            "\u202eabc",
            "\ud800",
            "x" * 3_000_000,
            "\x00",
            "\r\n",
            "{{7*7}}",
            "<script>alert(1)</script>",
            "é" * 1000,
        ]
    )
    good = {"prompt": "Say hi", "chosen": "Hi!", "rejected": "No."}
    number = chance.choice(["1" * 5000, "1e999", "NaN", "-Infinity", "1e-400", "0x10"])
    role = chance.choice(["user", "assistant", "system", text[:2000], "", None, 3, ["a"]])
    message = {"role": role, "content": chance.choice(["hello", text, None, 3, [], {}])}
    value = chance.choice([None, 3, [], {}, text, [message], [[message]], True, [text] * 3])
    return chance.choice([
        json.dumps(good | {chance.choice(["prompt", "chosen", "rejected"]): value}),
        json.dumps(good | {text[:3000]: value}),
        json.dumps(good | {"margin": 1})[:-2] + number + "}",
        "[" * deep + "]" * deep,
        '{"prompt": ' * deep + "1" + "}" * deep,
        json.dumps({"prompt": "a", "chosen": "b"} | {"rejected": 0})[:-2] + number + "}",
        json.dumps(good)[: chance.randrange(60)],
        json.dumps({"prompt": [message], "chosen": [message], "rejected": [message]}),
        json.dumps({"prompt": "a", "responses": ["b", value], "scores": [1, value]}),
        json.dumps({"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]})[:-3] + number + "]}",
        json.dumps({"prompt": text[:5000], "completion": text[:5000], "label": value}),
        json.dumps({"conversations": value, "chosen": value, "rejected": value}),
        json.dumps({"prompt": "a", "response_0": text, "response_1": "c",
                    "better_response_id": value}),
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "tools": value}),
        json.dumps({"chosen": f"\n\nHuman: {text}\n\nAssistant: a",
                    "rejected": f"\n\nHuman: {text}\n\nAssistant: b"}),
        json.dumps({"instruction": value, "input": value, "chosen": "a", "rejected": "b"}),
        json.dumps(value), number, text, '{"prompt": "a", "prompt": "b"}',
    ])  # fmt: skip


def hostile_file(chance: random.Random, folder: Path) -> Path:
    lines = [json.dumps({"prompt": f"Say {n}", "chosen": "Hi!", "rejected": "No."})
             for n in range(8)]  # fmt: skip
    for _ in range(chance.randint(1, 3)):
        lines.insert(chance.randrange(len(lines) + 1), hostile_record(chance))
    data = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    kind = chance.randrange(10)
    names = ["data", "d\x1b[31mta", "d ta", "data\u202e", "d\udcff", "d=ta", "-data", "data\n2"]
    name = chance.choice(names)
    if kind < 6:
        path = folder / f"{name}.jsonl"
    elif kind == 6:
        path, data = folder / "data.json", b"[" + b",".join(data.splitlines()) + b"]"
    elif kind == 7:
        path = folder / "data.jsonl.gz"
        data = gzip.compress(data)
        data = data[: chance.choice([len(data), len(data) // 2, 5, 0])]
    elif kind == 8:
        path = folder / chance.choice(["data.parquet", "data.arrow", "data.csv"])
        data = chance.choice([b"", b"PAR1", data, b"PAR1" + data + b"PAR1", whole_parquet(folder)])
        data = data[: chance.choice([len(data), len(data) // 2, len(data) - 9])]
    else:
        path, data = folder / "data.jsonl", data.replace(b"hi", bytes([chance.randrange(128, 256)]))
    path.write_bytes(data)
    return path


def whole_parquet(folder: Path) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"prompt": ["a"] * 9, "chosen": ["b"] * 9, "rejected": ["c"] * 9})
    parquet.write_table(table, folder / "whole.bin")
    return (folder / "whole.bin").read_bytes()


def data(chance: random.Random, folder: Path, world: World) -> str | None:
    """A hostile file in each of five commands."""
    path = hostile_file(chance, folder)
    template = chance.choice(["raw", "pku", "auto"])
    out = ["--out", str(folder / "out"), "--template", template]
    training = ["--model", str(world.model), "--batch_size", "4", "--steps", "1", "--eval_share",
                "0.2", "--max_length", "64"]  # fmt: skip
    small = ["--max_length", "64", "--max_new_tokens", "4"]
    models = ["--policy", str(world.model), "--baseline", str(world.model), "--reward",
              str(world.rm)]  # fmt: skip
    commands = (
        ("train_dpo.py", [*training, *out, f"--data={path}"]),
        ("train_rm.py", [*training, "--out", str(folder / "out2"), f"--data={path}"]),
        ("evaluate.py", ["rm", "--model", str(world.rm), "--out", str(folder / "out3"),
                         f"--data={path}"]),
        ("evaluate.py", ["policy", *models, *small, "--out", str(folder / "out4"),
                         f"--data={path}"]),
        ("evaluate.py", ["score", "--model", str(world.rm), f"--data={path}", "--out",
                         str(folder / "out5.jsonl")]),
    )  # fmt: skip
    for name, argv in commands:
        try:
            outcome = run_ranks(1, script, name, argv, (no_pictures,), timeout=SECONDS)
        except AssertionError as error:
            return f"{name} {argv[0]}: {str(error)[:200]}"
        if problem := bad_ending(outcome):
            shutil.copy(path, world.folder.parent / f"hostile_{folder.name}{path.suffix}")
            return f"{name} {argv[0]} on {path.name!r}: {problem}"
    return None


def no_pictures() -> None:
    def write(path: Path, *rest: object) -> None:
        Path(path).write_bytes(b"\x89PNG")

    for module, function in (("pictures", "policy_picture"), ("reward_pictures", "reward_picture")):
        sys.modules[f"nanoalign.evaluation.{module}"] = SimpleNamespace(**{function: write})


# --- hostile models -------------------------------------------------------------------------------

TEMPLATES = (
    "{{ 1 / 0 }}", "{% for x in range(10**11) %}x{% endfor %}", "{{ 'x' * 10**11 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99]['content'] }}",
    "{{ raise_exception('\x1b[31mno') }}", "{% if %}", "{{ ''.__class__.__mro__ }}",
    "{% for m in messages %}{{ m }}{% endfor %}", "{% set x = [] %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% set _ = x.append(i) %}{% endfor %}{% endfor %}",
    "{{ messages | map(attribute='content') | join }}", "", "{{ undefined.thing }}", "\ud800",
)  # fmt: skip
VALUES = (0, -1, 1, 3, 7, 10**12, 1e300, None, True, "x", "", [], [1], {}, float("nan"),
          "\x1b[31m", 3000)  # fmt: skip


def models(chance: random.Random, folder: Path, world: World) -> str | None:
    """A model folder with a mistake in one of its files."""
    model = shutil.copytree(world.model, folder / "model")
    kind = chance.randrange(8)
    if kind < 3:
        change(model / "config.json", chance)
    elif kind == 3:
        change(model / chance.choice(["tokenizer_config.json", "tokenizer.json"]), chance)
    elif kind == 4:
        settings = chance.choice(
            [
                "[1]",
                "{",
                "null",
                '{"eos_token_id": "x"}',
                '{"eos_token_id": [[1]]}',
                '{"temperature": "hot"}',
                '{"eos_token_id": 99999}',
            ]
        )
        (model / "generation_config.json").write_text(settings)
    elif kind == 5:
        template = chance.choice(TEMPLATES)
        (model / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    elif kind == 6:
        path = model / "model.safetensors"
        path.rename(model / "model-00001-of-00001.safetensors")
        index = chance.choice(
            [
                "[]",
                "{",
                '{"weight_map": []}',
                '{"weight_map": {"a": 3}}',
                '{"weight_map": {"a": "../../etc/passwd"}}',
                '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
                '{"weight_map": {"a": "none.safetensors"}}',
                '{"weight_map": {}}',
                "null",
            ]
        )
        (model / "model.safetensors.index.json").write_text(index)
    else:
        path = model / "model.safetensors"
        content = path.read_bytes()
        edits = [content[: chance.randrange(len(content))], b"", b"\xff" * 8 + content,
                 content.replace(b"F32", b"I32"), content.replace(b"F32", b"F99"),
                 content.replace(b"layers.0", b"layers.7"), content[:8] + b"[" + content[9:],
                 content.replace(b"[259,32]", b"[32,259]")]  # fmt: skip
        path.write_bytes(chance.choice(edits))
    argv = ["--model", str(model), "--data", str(world.pairs), "--out", str(folder / "out"),
            "--steps", "1", "--batch_size", "4"]  # fmt: skip
    chat = folder / "chat.jsonl"
    record = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hi!", "rejected": "No."}
    chat.write_text("".join(json.dumps(record) + "\n" for _ in range(8)))
    if kind == 5:
        argv[3] = str(chat)
    name = chance.choice(["train_dpo.py", "train_rm.py"])
    try:
        outcome = run_ranks(1, script, name, argv, (limit_memory,), timeout=SECONDS)
    except AssertionError as error:
        return f"{name}, kind {kind}: {str(error)[:200]}"
    if problem := bad_ending(outcome):
        shutil.copytree(model, world.folder.parent / f"model_{folder.name}", dirs_exist_ok=True)
        return f"{name}, kind {kind}: {problem}"
    return None


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))


def change(path: Path, chance: random.Random) -> None:
    settings = json.loads(path.read_text())
    for _ in range(chance.randint(1, 2)):
        part = settings
        while True:
            key = chance.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if isinstance(part[key], dict | list) and part[key] and chance.random() < 0.6:
                part = part[key]
                continue
            break
        if chance.random() < 0.2 and isinstance(part, dict):
            del part[key]
        else:
            part[key] = chance.choice(VALUES)
    path.write_text(json.dumps(settings))


# --- hostile flags --------------------------------------------------------------------------------


def flags(chance: random.Random, folder: Path, world: World) -> str | None:
    """Absurd values of flags."""
    (folder / "loop").symlink_to("loop")
    argv = ["--model", str(world.model), "--data", str(world.pairs), "--steps", "1",
            "--batch_size", "4", "--out", str(folder / "out")]  # fmt: skip
    more = chance.choice([
        ["--timeout", "1e300"], ["--timeout", "1e-9"], ["--lora_rank", "100000"],
        ["--steps", "10" * 20], ["--epochs", "1e300"], ["--out", str(folder / "loop")],
        ["--out", "/proc/x"], ["--out", "/dev/null"], ["--out", "a" * 300],
        ["--lr", "1e300"], ["--lr", "-1"], ["--beta", "nan"], ["--seed", "9" * 50],
        ["--batch_size", "9" * 30], ["--max_length", "1"], ["--max_length", "9" * 30],
        ["--micro_batch_tokens", "1"], ["--data", "/dev/zero"], ["--data", "/proc/self/mem"],
        ["--data", "tiny*1e-300"], ["--data", "tiny*2"],
        ["--model", "\x1b[31m"], ["--eval_share", "1"], ["--eval_share", "0.999999"],
        ["--keep", "0"], ["--stop_after", "-1"],
        ["--warmup", "1e300"], ["--max_grad_norm", "0"], ["--weight_decay", "1e300"],
        ["--label_smoothing", "1"], ["--cache", "/dev/null"], ["--args", "/dev/null"],
        ["--args", str(world.pairs)], ["--shard_size", "7"], ["--save_every", "9" * 30],
    ])  # fmt: skip
    outcome = run_ranks(1, script, "train_dpo.py", [*argv, *more], timeout=SECONDS)
    problem = bad_ending(outcome, (0, 1, 2))
    return f"{shlex.join(more)}: {problem}" if problem else None


# --- all of it ------------------------------------------------------------------------------------

FLIPPED = ("run/*.distcp", "run/.metadata", "run/run.json", "run/checksums.json",
           "run/metrics.jsonl", "run/records.npz", "cache/0*.safetensors", "cache/about.json",
           "cache/logps.safetensors")  # fmt: skip
KINDS: dict[str, tuple[Mishap, int]] = {
    "kills": (kills, 20),
    "full_disks": (full_disks, 4),
    "small_disks": (small_disks, 2),
    "signals": (signals, 3),
    "torchrun_signals": (torchrun_signals, 2),
    "writers": (writers, 3),
    **{f"flips:{kind}": (functools.partial(bit_flips, kind), 15) for kind in FLIPPED},
    "data": (data, 30),
    "models": (models, 20),
    "flags": (flags, 8),
}


def one(name: str, number: int, seed: int, world: World) -> str | None:
    folder = world.folder / "mishaps" / f"{re.sub(r'[^a-z]', '_', name)}_{number}"
    folder.mkdir(parents=True)
    try:
        return KINDS[name][0](random.Random(f"{seed} {name} {number}"), folder, world)
    except AssertionError as error:  # of run_ranks: it took too long
        return str(error)[:300]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--times", type=float, default=0.1, help="1: the counts of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mishap of each kind")
    args = parser.parse_args()
    start, failures, tried = time.monotonic(), [], Counter()
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(2) as pool:
        world = World(Path(parent) / "world")
        names = [k for k in KINDS if not args.kinds or k in args.kinds
                 or k.partition(":")[0] in args.kinds]  # fmt: skip
        jobs = []
        for name in names:
            count = max(1, round(KINDS[name][1] * args.times))
            numbers = range(count) if args.only is None else [args.only]
            jobs += [(name, n, pool.submit(one, name, n, args.seed, world)) for n in numbers]
        for name, number, job in jobs:
            tried[name] += 1
            if problem := job.result():
                failures.append(name)
                print(f"{name} {number}: {problem}", flush=True)
        for path in Path(parent).glob("*_*"):  # what was hostile
            shutil.move(path, Path(tempfile.gettempdir()) / f"storm_{path.name}")
    print("\n| mishap | tried | failed |\n|---|---|---|")
    for name in names:
        print(f"| {name} | {tried[name]} | {failures.count(name)} |")
    print(f"\n{sum(tried.values())} in {time.monotonic() - start:.0f} s, seed {args.seed}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
