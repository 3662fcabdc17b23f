"""Mishaps of storm.py that no run may answer with a traceback: hostile data, models and flags."""

import gzip
import json
import os
import random
import shlex
import shutil
import sys
import time
from pathlib import Path

from storm_runs import SECONDS, World, bad_ending, limit_memory, no_pictures, not_refused, start

DEEP = "[" * 5000 + "]" * 5000

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
    template = ["--template", chance.choice(["raw", "pku", "auto"])]
    training = ["--model", world.model, "--batch_size", 4, "--steps", 1, "--eval_share", 0.2,
                "--max_length", 64, *template]  # fmt: skip
    models = ["--policy", world.model, "--baseline", world.model, "--reward", world.rm]
    commands = (
        ("train_dpo.py", [*training, "--out", folder / "out"]),
        ("train_rm.py", [*training, "--out", folder / "out2"]),
        ("evaluate.py", ["rm", "--model", world.rm, "--out", folder / "out3"]),
        ("evaluate.py", ["policy", *models, "--max_length", 64, "--max_new_tokens", 4,
                         "--out", folder / "out4"]),
        ("evaluate.py", ["score", "--model", world.rm, "--out", folder / "out5.jsonl"]),
    )  # fmt: skip
    for name, argv in commands:
        if problem := bad_ending(start(name, [*argv, f"--data={path}"], (no_pictures,))):
            return f"{name} {argv[0]} on {path.name!r}: {problem}"
    return None


# --- hostile models -------------------------------------------------------------------------------

VALUES = (0, -1, 1, 3, 7, 10**12, 1e300, None, True, "x", "", [], [1], {}, float("nan"),
          "\x1b[31m", 3000)  # fmt: skip


def models(chance: random.Random, folder: Path, world: World) -> str | None:
    """A model folder with a mistake in one of its files."""
    model = shutil.copytree(world.model, folder / "model")
    kind = chance.randrange(7)
    if kind < 3:
        change(model / "config.json", chance)
    elif kind == 3:
        change(model / chance.choice(["tokenizer_config.json", "tokenizer.json"]), chance)
    elif kind == 4:
        value = chance.choice(['"x"', "[[1]]", "99999", "[1]}", '2, "temperature": "hot"'])
        (model / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    elif kind == 5:
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
    name = chance.choice(["train_dpo.py", "train_rm.py"])
    argv = world.argv(folder / "out", "--model", model, "--steps", 1)
    problem = bad_ending(start(name, argv, (limit_memory, 2**33)))
    return f"{name}, kind {kind}: {problem}" if problem else None


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


def bombs(chance: random.Random, folder: Path, world: World) -> str | None:
    """A model whose settings, or their files, would take many gigabytes."""
    model = shutil.copytree(world.model, folder / "model")
    name = chance.choice(["config.json", "tokenizer_config.json", "tokenizer.json"])
    content = json.loads((model / name).read_text())
    more = chance.choice([
        {"num_labels": 10**9}, {"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 10**9}},
        {"extra_ids": 10**9, "tokenizer_class": "T5TokenizerFast"}, {"vocab_size": 10**9},
    ])  # fmt: skip
    (model / name).write_text(json.dumps(content | more))
    if chance.random() < 0.3:
        os.truncate(model / name, 2 * 10**8)
    if chance.random() < 0.2:
        (model / name).write_text(DEEP)
    argv = world.argv(folder / "out", "--model", model)
    return bad_ending(start("train_dpo.py", argv, (limit_memory, 2**33)))


# --- hostile templates ---------------------------------------------------------------------------

LIGHT = (
    "{{ 1 / 0 }}", "{% for x in range(10**11) %}x{% endfor %}", "{{ 'x' * 10**11 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99]['content'] }}",
    "{{ raise_exception('\x1b[31mno') }}", "{% if %}", "{{ ''.__class__.__mro__ }}",
    "{% for m in messages %}{{ m }}{% endfor %}", "{% set x = [] %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% set _ = x.append(i) %}{% endfor %}{% endfor %}",
    "{{ messages | map(attribute='content') | join }}", "", "{{ undefined.thing }}", "\ud800",
    "{{ '\\ud83d' }}{{ messages[0]['content'] }}",
)  # fmt: skip
DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(40) %}{% set n.x = n.x SIGN n.x %}"
DOUBLED += "{% endfor %}"
BIG = "(('f' * 9999 ~ messages | length) | int(base=16))"
# Templates of which one call of C would take minutes, or gigabytes.
HEAVY = (
    "{{ 10 ** (10 ** 8) }}",
    "{% if 3 ** 9999999 > 1 %}a{% endif %}",
    DOUBLED.replace("START", "3").replace("SIGN", "*"),
    f"{{{{ {BIG} // 3 }}}}",
    f"{{{{ 3 % {BIG} }}}}",
    "{{ 10 | round(-99999999) }}",
    "{{ (('a' * 10 ** 9) * 3) | length }}",
    "{{ ([0] * 10 ** 9) | length }}",
    "{{ ('a ' * 10 ** 9) | wordwrap(1) | length }}",
    "{{ ('%999999999d' % 1) | length }}",
    "{{ '{:>999999999}'.format(1) | length }}",
    "{{ ('a' | center(999999999)) | length }}",
    "{{ 'a'.ljust(999999999) | length }}",
    "{{ ('a' * 9999999).replace('a', 'b' * 999) | length }}",
    "{{ ('b' * 999).join('a' * 9999999) | length }}",
    "{{ [[1]] | tojson(indent=999999999) | length }}",
    DOUBLED.replace("START", "'abcdefgh'").replace("SIGN", "+"),
    DOUBLED.replace("START", "'abcdefgh'").replace("SIGN", "~"),
    DOUBLED.replace("START", "[1]").replace("SIGN", "+"),
)


def templates(chance: random.Random, folder: Path, world: World) -> str | None:
    """A template that fails, or that computes much in one call of C: one line, in 2 GB."""
    model, heavy = shutil.copytree(world.model, folder / "model"), chance.random() < 0.6
    template = chance.choice(HEAVY if heavy else LIGHT)
    (model / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    argv = world.argv(folder / "out", "--model", model, "--data", world.chat, "--steps", 1)
    begun = time.monotonic()
    outcome = start("train_dpo.py", [*argv, "--template", "auto"], (limit_memory, 2**31))
    if heavy:
        words = "MemoryError|an integer of more|it takes more than"  # the last: on a busy machine
        problem = not_refused(outcome, words)
    else:
        problem = bad_ending(outcome)
    if not problem and time.monotonic() - begun > SECONDS / 2:
        problem = "it took half a minute"
    return f"{template!r}: {problem}" if problem else None


# --- hostile flags --------------------------------------------------------------------------------


def flags(chance: random.Random, folder: Path, world: World) -> str | None:
    """Absurd values of flags."""
    (folder / "loop").symlink_to("loop")
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
    argv = world.argv(folder / "out", "--steps", 1, *more)
    problem = bad_ending(start("train_dpo.py", argv), (0, 1, 2))
    return f"{shlex.join(more)}: {problem}" if problem else None


# --- hostile names -------------------------------------------------------------------------------


def locales(chance: random.Random, folder: Path, world: World) -> str | None:
    """A terminal of ASCII, and names and texts that it does not have."""
    name = chance.choice(["größe", "数", "\u202eabc", "$x$", "<b>&", "[a](b)", "`x`", "\x1b[31m"])
    path = folder / f"{name}.jsonl"
    shutil.copy(world.pairs, path)
    argv = ["rm", "--model", world.rm, "--data", path, "--out", folder / name]
    outcome = start("evaluate.py", argv, (_ascii,))
    if "\x1b" in name:  # a flag with controls is refused
        return bad_ending(outcome) or (None if "\\x1b" in outcome.stderr else "no refusal")
    if outcome.codes != [0]:
        return f"{name!r}: {outcome.stderr[-200:]}"
    cases = (folder / name / "cases.md").read_text(encoding="utf-8")
    live = [mark for mark in ("<b>", "](") if mark in cases]
    return bad_ending(outcome) or (f"{name!r}: {live} in cases.md" if live else None)


def _ascii() -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")
