"""Where host memory goes: a DPO step with its parts, and how much loading takes over all ranks.

    python benchmarks/shapes.py qwen2.5-0.5b runs/qwen-0.5b
    python benchmarks/memory.py step runs/qwen-0.5b --pairs 4 --max_length 1024
    python benchmarks/shapes.py qwen2.5-3b runs/qwen-3b
    python benchmarks/memory.py load runs/qwen-3b --ranks 4

`step` fills every pair to the brim: half of max_length are the prompt's tokens, half are each response's.
`load` counts the private memory of every rank (Linux's Pss_Anon: what it shares with others, it shares the
count of, and pages of files that are only mapped are the system's to drop).
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GB = 1e9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="DPO steps in one process")
    step.add_argument("model")
    step.add_argument("--pairs", type=int, default=4, help="of an optimizer step")
    step.add_argument("--max_length", type=int, default=1024)
    step.add_argument("--steps", type=int, default=2)
    step.add_argument("--flags", default="", help="more flags for train_dpo.py, in one string")
    load = commands.add_parser("load", help="a policy, sharded over ranks")
    load.add_argument("model")
    load.add_argument("--ranks", type=int, default=4)
    return parser.parse_args()


def _held(field: str = "VmRSS") -> int:
    """Bytes: VmRSS now, VmHWM the most since it was last forgotten."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _forget() -> None:
    """From here on VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def step(args: argparse.Namespace) -> None:
    import train_dpo
    from nanoalign import distributed, loop
    from nanoalign.models import Policy

    notes: dict[str, int] = {"python and its packages": _held()}
    counted: dict[str, int] = {}  # of what lives now
    parts: dict[str, int] = {}  # as they were in the last step
    peaks, begun, seconds = {}, [], []
    get_lr, adamw, load = loop.get_lr, torch.optim.AdamW.step, Policy.load

    def loaded(*positional, **named) -> Policy:
        policy = load(*positional, **named)
        name = "parameters" if named.get("trainable", True) else "the reference's parameters"
        counted[name] = sum(distributed.local(p).nbytes for p in policy.parameters())
        weakref.finalize(policy, counted.pop, name, None)  # a reference that is freed is no part
        return policy

    def before(*arguments) -> float:
        notes.setdefault("before the first step", _held())
        begun.append(time.perf_counter())
        _forget()
        return get_lr(*arguments)

    def stepped(optimizer, *arguments, **named) -> None:
        peaks["forward and backward"] = max(peaks.get("forward and backward", 0), _held("VmHWM"))
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        counted["gradients"] = sum(distributed.local(g).nbytes for g in grads if g is not None)
        adamw(optimizer, *arguments, **named)
        seconds.append(time.perf_counter() - begun[-1])
        states = [value for state in optimizer.state.values() for value in state.values()]
        counted["AdamW's two moments"] = sum(
            distributed.local(value).nbytes for value in states if value.ndim
        )
        peaks["forward, backward and AdamW"] = _held("VmHWM")
        parts.update(counted)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        _write_long_pairs(data, args)
        argv = ["--model", args.model, "--data", str(data), "--eval_share", "0", "--template", "raw",
                "--batch_size", str(args.pairs), "--max_length", str(args.max_length),
                "--steps", str(args.steps), "--out", f"{folder}/run", "--cache", f"{folder}/cache",
                *args.flags.split()]  # fmt: skip
        saved = patch.object(Policy, "save", lambda *_: None)
        with (
            patch.object(train_dpo.Policy, "load", loaded),
            patch.object(loop, "get_lr", before),
            patch.object(torch.optim.AdamW, "step", stepped),
            patch.object(train_dpo, "curves", lambda *_: None),
            saved,
        ):
            train_dpo.main(argv)
    most = max(peaks.values())
    print(
        f"\npeak {most / GB:.2f} GB in steps of {args.pairs} pairs of {args.max_length} tokens a "
        f"sequence, {args.flags or 'default flags'}; a step takes {seconds[-1]:.0f} s"
    )
    rest = most - notes["python and its packages"] - sum(parts.values())
    parts["python and its packages"] = notes["python and its packages"]
    parts["gathered parameters, activations, logits and the rest"] = rest
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{size / GB:8.2f} GB  {name}")
    for name, size in (notes | peaks).items():
        print(f"{size / GB:8.2f} GB  held: {name}")


def _write_long_pairs(path: Path, args: argparse.Namespace) -> None:
    """Random bytes as text: prompt and each response have at least half of max_length tokens."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(
            draw.choice("abcdefghijklmnop0123456789") for _ in range(3 * args.max_length)
        )

    with path.open("w") as file:
        for _ in range(args.pairs * args.steps):
            record = {"prompt": text(), "chosen": text(), "rejected": text()}
            file.write(json.dumps(record) + "\n")


# --- loading --------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), 29500 + os.getpid() % 1000
    ranks = [
        context.Process(target=_load_rank, args=(rank, args.ranks, port, args.model, queue))
        for rank in range(args.ranks)
    ]
    for process in ranks:
        process.start()
    pids, most, parts = [process.pid for process in ranks], 0, []
    while any(process.is_alive() for process in ranks):
        now = [_private(pid) for pid in pids]
        if sum(now) > most:
            most, parts = sum(now), now
        time.sleep(0.02)
    results = [queue.get() for _ in ranks]
    model = sum(result["parameters"] for result in results)
    before = sum(result["before"] for result in results)
    print(f"model {model / GB:.2f} GB in float32 over {args.ranks} ranks; peak of private memory "
          f"{most / GB:.2f} GB ({', '.join(f'{part / GB:.2f}' for part in parts)}), "
          f"{most / model:.3f} times the model; {before / GB:.2f} GB of it were python's before "
          f"loading: without, {(most - before) / model:.3f}; "
          f"{max(result['seconds'] for result in results):.0f} s")  # fmt: skip


def _private(pid: int) -> int:
    """Bytes of a process that no file backs, its share of what processes share."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(rollup.split("Pss_Anon:")[1].split()[0]) if "Pss_Anon:" in rollup else 0


def _load_rank(rank: int, ranks: int, port: int, model: str, queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    from nanoalign.distributed import local, setup
    from nanoalign.models import Policy

    world = setup()
    before, begun = _private(os.getpid()), time.perf_counter()
    policy = Policy.load(model, world)
    size = sum(local(p).nbytes for p in policy.parameters())
    queue.put({"parameters": size, "before": before, "seconds": time.perf_counter() - begun})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    {"step": step, "load": load}[arguments.command](arguments)
