"""Host memory: the parts of a DPO step, of a long response, and the peak of loading over all ranks.

    python benchmarks/shapes.py qwen2.5-0.5b runs/qwen-0.5b
    python benchmarks/memory.py step runs/qwen-0.5b --pairs 4 --max_length 1024
    python benchmarks/memory.py long 4000 8000 16000
    python benchmarks/shapes.py qwen2.5-3b runs/qwen-3b
    python benchmarks/memory.py load runs/qwen-3b --ranks 4
    python benchmarks/memory.py load runs/qwen-3b --flags "--lora_rank 8 --base_dtype nf4"

`step` takes the pairs of --data, or makes pairs of the largest size: half of max_length are tokens
of the prompt, half are tokens of each response. `long` compares the attention of packed rows with
the model's own on one response, forward and backward. `load` adds up the private memory of all
ranks (Pss_Anon of Linux: a page that processes share is divided among them, and pages of mapped
files are not counted).
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_dpo
from nanoalign import batch, loop
from nanoalign.distributed import setup
from nanoalign.model import Policy
from nanoalign.packing import attention, packed
from nanoalign.runs import result
from nanoalign.weights import frozen
from nanoalign.weights.folders import local_folder
from nanoalign.weights.slices import read_slices

GB = 1e9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="DPO steps in one process")
    step.add_argument("model")
    step.add_argument("--data", help="preference records; without, made ones of the largest size")
    step.add_argument("--pairs", type=int, default=4, help="of an optimizer step")
    step.add_argument("--max_length", type=int, default=1024)
    step.add_argument("--steps", type=int, default=2)
    step.add_argument("--flags", default="", help="more flags for train_dpo.py, in one string")
    long = commands.add_parser("long", help="one response, 2 layers of width 256")
    long.add_argument("tokens", type=int, nargs="+", help="of the response; its prompt has 100")
    long.add_argument("--window", type=int, help="of all layers, in tokens")
    long.add_argument("--softcap", type=float, help="of scores: attention by hand")
    load = commands.add_parser("load", help="a policy, sharded over ranks")
    load.add_argument("model")
    load.add_argument("--ranks", type=int, default=4)
    load.add_argument("--flags", default="", help="LoRA's, of which the frozen base is read")
    return parser.parse_args()


def _memory(field: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM the peak since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _reset_peak() -> None:
    """Sets VmHWM to the memory of now."""
    Path("/proc/self/clear_refs").write_text("5")


def step(args: argparse.Namespace) -> None:
    totals: dict[str, int] = {"python and its packages": _memory()}
    counted: dict[str, int] = {}  # bytes of the parts that are in memory
    parts: dict[str, int] = {}  # the same, in the last step
    peaks: dict[str, int] = {}  # of memory, by what was computed
    begun, seconds, shares, faults, losses = [], [], [], [], []
    get_lr, adamw, load = loop.get_lr, torch.optim.AdamW.step, Policy.load
    loss_of_batch, backward = train_dpo.loss_of_batch, torch.Tensor.backward

    def counted_load(*positional, **named) -> Policy:
        policy = load(*positional, **named)
        trained = any(p.requires_grad for p in policy.parameters())
        name = "parameters" if trained else "parameters of the reference"
        counted[name] = sum(_local(p).nbytes for p in policy.parameters())
        weakref.finalize(policy, counted.pop, name, None)  # --precompute_reference frees it
        return policy

    def begin_step(*arguments) -> float:
        totals.setdefault("before the first step", _memory())
        begun.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)))
        _reset_peak()
        return get_lr(*arguments)

    def with_peak(name: str, function: Callable, *arguments, **named) -> object:
        _reset_peak()
        result = function(*arguments, **named)
        if begun:  # else it is a check before the first step
            peaks[name] = max(peaks.get(name, 0), _memory("VmHWM"))
        return result

    def counted_backward(loss: torch.Tensor) -> None:
        losses.append(loss.item())
        with_peak("backward", backward, loss)

    def counted_step(optimizer, *arguments, **named) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        counted["gradients"] = sum(_local(g).nbytes for g in grads if g is not None)
        with_peak("AdamW", adamw, optimizer, *arguments, **named)
        (began, before), now = begun[-1], resource.getrusage(resource.RUSAGE_SELF)
        seconds.append(time.perf_counter() - began)
        kernel, user = now.ru_stime - before.ru_stime, now.ru_utime - before.ru_utime
        shares.append(kernel / (kernel + user))
        faults.append(now.ru_minflt - before.ru_minflt)
        states = [value for state in optimizer.state.values() for value in state.values()]
        counted["AdamW's two moments"] = sum(_local(value).nbytes for value in states if value.ndim)
        parts.update(counted)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(args.data or f"{folder}/pairs.jsonl")
        if not args.data:
            _write_long_pairs(data, args)
        argv = ["--model", args.model, "--data", str(data), "--eval_share", "0",
                "--template", "auto" if args.data else "raw", "--batch_size", str(args.pairs),
                "--steps", str(args.steps), "--max_length", str(args.max_length),
                "--out", f"{folder}/run", *args.flags.split()]  # fmt: skip
        os.environ["NANOALIGN_CACHE"] = f"{folder}/cache"  # for --precompute_reference
        with (
            patch.object(train_dpo.Policy, "load", counted_load),
            patch.object(loop, "get_lr", begin_step),
            patch.object(train_dpo, "loss_of_batch", partial(with_peak, "forward", loss_of_batch)),
            patch.object(torch.Tensor, "backward", counted_backward),
            patch.object(torch.optim.AdamW, "step", counted_step),
            patch.object(result, "finish", lambda *_: None),
            patch.object(train_dpo, "write_model", lambda *_, **__: None),
        ):
            train_dpo.main(argv)
    most = max(peaks.values())
    print(
        f"\npeak {most / GB:.2f} GB in steps of {args.pairs} pairs of {args.max_length} tokens a "
        f"sequence, {args.flags or 'default flags'}; a step takes {seconds[-1]:.1f} s, of whose "
        f"CPU time the kernel has {100 * shares[-1]:.0f} %, with {faults[-1]:,} page faults"
    )
    rest = most - totals["python and its packages"] - sum(parts.values())
    parts["python and its packages"] = totals["python and its packages"]
    parts["gathered parameters, activations, logits and the rest"] = rest
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{size / GB:8.2f} GB  {name}")
    for name, size in (totals | peaks).items():
        print(f"{size / GB:8.2f} GB  in all: {name}")
    print(f"losses {', '.join(map(repr, losses))}")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _write_long_pairs(path: Path, args: argparse.Namespace) -> None:
    """Random letters as text: prompt and each response have at least half of max_length tokens."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(
            draw.choice("abcdefghijklmnop0123456789") for _ in range(3 * args.max_length)
        )

    with path.open("w") as file:
        for _ in range(args.pairs * args.steps):
            record = {"prompt": text(), "chosen": text(), "rejected": text()}
            file.write(json.dumps(record) + "\n")


# --- a long response ------------------------------------------------------------------------------


def long(args: argparse.Namespace) -> None:
    """Each measurement in a process of its own."""
    kind = f"window {args.window}, soft cap {args.softcap}"
    print(f"| tokens | GB, model's own attention | s | GB, packed rows | s |  {kind}")
    for tokens in args.tokens:
        cells = []
        for is_packed in (False, True):
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            job = (tokens, is_packed, args.window, args.softcap, queue)
            process = context.Process(target=_measure_response, args=job)
            process.start()
            cells += queue.get()
            process.join()
        print(
            f"| {tokens:,} | {cells[0] / GB:.2f} | {cells[1]:.1f} | {cells[2] / GB:.2f} | "
            f"{cells[3]:.1f} |",
            flush=True,
        )


def _measure_response(tokens: int, is_packed: bool, window: int | None, cap: float | None, queue):
    """Puts (bytes at the peak beyond those of the model, seconds) of a forward and backward."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 2**20, "sliding_window": window}  # fmt: skip
    config = MistralConfig(**shape)
    if cap is not None:  # layers with and without a window, in turn
        shape["sliding_window"] = window or 2**20
        config = Gemma2Config(**shape, attn_logit_softcapping=cap)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    prompt, response = (np.arange(n, dtype=np.int32) % 512 for n in (100, tokens))
    row = batch.Row("", prompt, (response,), pairs=())
    if is_packed:
        attention.use_tree_attention(policy.model)
    scored = (packed if is_packed else batch).collate([row])
    before, begun = _memory(), time.perf_counter()
    _reset_peak()
    policy(scored).sum().backward()
    queue.put((_memory("VmHWM") - before, time.perf_counter() - begun))


# --- loading --------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), 29500 + os.getpid() % 1000
    ranks = [
        context.Process(target=_load_rank, args=(rank, args.ranks, port, args, queue))
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
    print(
        f"model {model / GB:.2f} GB over {args.ranks} ranks {args.flags}; peak of private memory "
        f"{most / GB:.2f} GB ({', '.join(f'{part / GB:.2f}' for part in parts)}), "
        f"{most / model:.3f} times the model; {before / GB:.2f} GB of it were in use before "
        f"loading, and without these it is {(most - before) / model:.3f} times; "
        f"{max(result['seconds'] for result in results):.0f} s"
    )


def _private(pid: int) -> int:
    """Pss_Anon of a process, in bytes."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(rollup.split("Pss_Anon:")[1].split()[0]) if "Pss_Anon:" in rollup else 0


def _load_rank(rank: int, ranks: int, port: int, args: argparse.Namespace, queue) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

    world = setup()
    before, begun = _private(os.getpid()), time.perf_counter()
    flags = train_dpo.parse_args(args.flags.split())
    read = frozen.reading(read_slices, flags, torch.bfloat16)
    options = (torch.bfloat16, False) if args.flags else ()  # what adapters leave frozen
    policy = Policy.load(local_folder(args.model), world, *options, read=read)
    size = sum(_local(p).nbytes for p in policy.parameters())
    queue.put({"parameters": size, "before": before, "seconds": time.perf_counter() - begun})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    {"step": step, "long": long, "load": load}[arguments.command](arguments)
