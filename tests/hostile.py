"""Hostile data, models and flags: mishaps of storm.py that no run may answer with a traceback."""

import gzip
import json
import random
import resource
import shlex
import shutil
from pathlib import Path

from processes import run_ranks
from storm_runs import SECONDS, World, bad_ending, script

from nanoalign.evaluation import plots

# --- hostile data ---------------------------------------------------------------------------------


def hostile_record(chance: random.Random) -> str:
    """A line of a .jsonl file."""
    deep = chance.choice([100, 900, 3000, 100_000])
    text = chance.choice(
        ["", " ", "\x1b[2J\x07", "\u202eabc", "\ud800", "x" * 3_000_000, "\x00\r\n"]
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
        outcome = run_ranks(1, script, name, argv, (no_pictures,), timeout=SECONDS)
        if problem := bad_ending(outcome):
            return f"{name} {argv[0]} on {path.name!r}: {problem}"
    return None


def no_pictures() -> None:
    def write(path: Path, *rest: object) -> None:
        Path(path).write_bytes(b"\x89PNG")

    plots.policy_picture = plots.reward_picture = write


# --- hostile models -------------------------------------------------------------------------------

TEMPLATES = (
    "{{ 1 / 0 }}", "{% for x in range(10**11) %}x{% endfor %}", "{{ 'x' * 10**11 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99]['content'] }}",
    "{{ raise_exception('\x1b[31mno') }}", "{% if %}", "{{ ''.__class__.__mro__ }}",
    "{% for m in messages %}{{ m }}{% endfor %}", "{% set x = [] %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% set _ = x.append(i) %}{% endfor %}{% endfor %}",
    "{{ messages | map(attribute='content') | join }}", "", "{{ undefined.thing }}", "\ud800",
    "{{ '\\ud83d' }}{{ messages[0]['content'] }}",
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
        value = chance.choice(['"x"', "[[1]]", "99999", "[1]}", '2, "temperature": "hot"'])
        (model / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    elif kind == 5:
        template = chance.choice(TEMPLATES)
        (model / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    elif kind == 6:
        name = "model-00001-of-00001.safetensors"
        (model / "model.safetensors").rename(model / name)
        names = f'{{"a": "{name}"}}', '{"a": "../../etc/passwd"}', '{"a": 3}', "{}", "[]", "{"
        index = f'{{"weight_map": {chance.choice(names)}}}'
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
    outcome = run_ranks(1, script, name, argv, (limit_memory,), timeout=SECONDS)
    problem = bad_ending(outcome)
    return f"{name}, kind {kind}: {problem}" if problem else None


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
        ["--timeout", "1e300"], ["--timeout", "1e-9"], ["--lora_rank", "0"],
        ["--steps", "10" * 20], ["--epochs", "1e300"], ["--out", str(folder / "loop")],
        ["--out", "/proc/x"], ["--out", "/dev/null"], ["--out", "a" * 300],
        ["--lr", "1e300"], ["--lr", "-1"], ["--beta", "nan"], ["--seed", "9" * 50],
        ["--batch_size", "9" * 30], ["--max_length", "1"], ["--max_length", "9" * 30],
        ["--micro_batch_tokens", "1"], ["--data", "/dev/zero"], ["--data", "/proc/self/mem"],
        ["--data", "tiny*1e-300"], ["--data", "tiny*2"],
        ["--model", "\x1b[31m"], ["--eval_share", "1"], ["--eval_share", "0.999999"],
        ["--keep", "0"], ["--stop_after", "-1"],
        ["--warmup", "1e300"], ["--max_grad_norm", "0"], ["--weight_decay", "1e300"],
        ["--label_smoothing", "1"], ["--cache", "/dev/null"],
        ["--shard_size", "7"], ["--save_every", "9" * 30],
    ])  # fmt: skip
    outcome = run_ranks(1, script, "train_dpo.py", [*argv, *more], timeout=SECONDS)
    problem = bad_ending(outcome, (0, 1, 2))
    return f"{shlex.join(more)}: {problem}" if problem else None
