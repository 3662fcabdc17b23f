"""Host time of a DPO step: matrices are tiny, so what is measured is Python and launches.

    python benchmarks/host.py                                    float32, one rank
    python benchmarks/host.py --precision bf16 --ranks 2
    python benchmarks/host.py --checkout FOLDER --rounds 5       beside another commit
    python benchmarks/host.py --compile                          beside compiled blocks and head

A Qwen2 of 24 layers and width 64 with random weights, on a CPU with one thread a rank. Each
response is a line of its own, so that attention is one call a layer, as on a GPU. Every run is a
process of its own, and the runs alternate. `plain` is the same model as transformers loads it,
without sharding, in float32.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_dpo
from nanoalign import batch, loop, metrics, model
from nanoalign.batch import Batch, collate
from nanoalign.encode import encode_all
from nanoalign.model import Policy
from nanoalign.records import Record
from nanoalign.runs import result
from nanoalign.weights.folders import load_tokenizer

MICRO_BATCHES = 4  # of a step on each rank, of one pair
LETTERS = 16  # of a prompt, and of a response


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--checkout", metavar="FOLDER", help="nanoalign of another commit")
    other.add_argument("--compile", action="store_true", help="a plain run and a compiled one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--steps", type=int, default=12, help="of a run; the first three not timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, alternating")
    parser.add_argument("--flags", default="", help="more flags for train_dpo.py, in one string")
    parser.add_argument("--profile", action="store_true", help="cProfile's table of the steps")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what a process of a run does
    return parser.parse_args()


def write_model(folder: Path) -> None:
    tokenizer = load_tokenizer(model.TINY)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            texts = ["".join(draw.choices("abcdefgh", k=LETTERS)) for _ in range(3)]
            record = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            file.write(json.dumps(record) + "\n")


# --- one process of a run -------------------------------------------------------------------------


class Times:
    """Seconds of each call of functions, by a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def of(self, name: str, function: Callable) -> Callable:
        def timed(*args, **named):
            begun = time.thread_time()
            result = function(*args, **named)
            self.seconds[name].append(time.thread_time() - begun)
            return result

        return timed

    def milliseconds(self, steps: int, skipped: int) -> dict[str, float]:
        """Of one step: the median over steps, but for the first ones."""
        sums = {}
        for name, seconds in self.seconds.items():
            calls = len(seconds) // steps
            each = [sum(seconds[n * calls : (n + 1) * calls]) for n in range(steps)]
            sums[name] = 1e3 * statistics.median(each[skipped:])
        return sums


def run_job(job: dict) -> None:
    """Trains by train_dpo.py and prints milliseconds of a step as JSON, on rank 0."""
    torch.set_num_threads(1)
    times, begun, profiler = Times(), [], cProfile.Profile()
    get_lr, loss_of_batch, train = loop.get_lr, train_dpo.loss_of_batch, loop.train

    def begin_step(*args) -> float:
        begun.append(time.thread_time())
        if job["profile"] and len(begun) == 4:
            profiler.enable()
        return get_lr(*args)

    def timed_loss(policy, reference, *args):
        if not torch.is_grad_enabled():
            return loss_of_batch(policy, reference, *args)
        policy = times.of("policy forward", policy)
        return loss_of_batch(policy, times.of("reference forward", reference), *args)

    def timed_train(*args, **named) -> bool:
        times.seconds.clear()
        done = train(*args, **named)
        begun.append(time.thread_time())
        profiler.disable()
        return done

    def timed(owner: object, attribute: str, name: str):
        return patch.object(owner, attribute, times.of(name, getattr(owner, attribute)))

    argv = ["--model", job["model"], "--data", job["data"], "--template", "raw",
            "--eval_share", "0", "--no-share_prefix", "--micro_batch_tokens", "1",
            "--batch_size", str(MICRO_BATCHES * job["ranks"]), "--steps", str(job["steps"]),
            "--precision", job["precision"], "--out", f"{job['folder']}/run", "--overwrite",
            *job["flags"].split()]  # fmt: skip
    with (
        patch.object(loop, "get_lr", begin_step),
        patch.object(loop, "train", timed_train),
        patch.object(train_dpo, "loss_of_batch", timed_loss),
        patch.object(result, "finish", lambda *_: None),
        patch.object(train_dpo, "write_model", lambda *_, **__: None),
        timed(torch.Tensor, "backward", "backward"),
        timed(torch.nn.utils, "clip_grad_norm_", "clip"),
        timed(torch.optim.AdamW, "step", "AdamW"),
        timed(loop.Batcher, "plan", "plan"),
        patch.object(loop.Batcher, "collate", staticmethod(times.of("collate", batch.collate))),
        timed(Batch, "to", "batch to the device"),
        timed(metrics.Means, "add", "metrics"),
    ):
        train_dpo.main(argv)
    if os.environ.get("RANK", "0") == "0":
        found = times.milliseconds(job["steps"], 3)
        steps = [1e3 * (b - a) for a, b in zip(begun[3:], begun[4:], strict=False)]
        found["step"] = statistics.median(steps)
        if job["ranks"] == 1 and job["precision"] == "fp32":
            found |= plain(job)
        if job["profile"]:
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(40)
        print("\n" + json.dumps(found))


def plain(job: dict) -> dict[str, float]:
    """Milliseconds of a step's forwards and backwards with plain modules."""
    policy, times = Policy.load(job["model"]), Times()
    record = Record("a" * LETTERS, ("b" * LETTERS, "c" * LETTERS), name="plain")
    batch = collate(encode_all([record], load_tokenizer(job["model"])))
    for _ in range(MICRO_BATCHES * job["steps"]):
        with torch.no_grad():
            times.of("plain reference forward", policy)(batch)
        loss = times.of("plain policy forward", policy)(batch).sum()
        times.of("plain backward", loss.backward)()
        policy.zero_grad()
    return times.milliseconds(job["steps"], 3)


# --- all runs -------------------------------------------------------------------------------------


def run(job: dict) -> dict[str, float]:
    """Starts the processes of a run; what rank 0 measured."""
    port, processes = 29500 + random.randrange(1000), []
    for rank in range(job["ranks"]):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["NANOALIGN_CACHE"] = f"{job['folder']}/cache"
        if job["ranks"] > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(job["ranks"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        script = str(Path(job["checkout"], "benchmarks", "host.py"))  # names are of its commit
        command = [sys.executable, script, "--job", json.dumps(job)]
        error = None if job["profile"] and rank == 0 else subprocess.PIPE
        processes.append(
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=error
            )
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(error)
    return json.loads(outputs[0][0].splitlines()[-1])


def main() -> None:
    args = parse_args()
    if args.job:
        return run_job(json.loads(args.job))
    both = bool(args.checkout or args.compile)
    jobs = {"now": {"checkout": str(ROOT)}}
    if args.checkout:
        jobs = {"before": {"checkout": str(Path(args.checkout).resolve())}} | jobs
    if args.compile:
        flags = {"plain": "--compile off", "compiled": "--compile on"}
        jobs = {k: {"checkout": str(ROOT), "flags": f"{args.flags} {v}"} for k, v in flags.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        write_pairs(data := Path(folder) / "pairs.jsonl", MICRO_BATCHES * args.ranks * args.steps)
        shared = {name: getattr(args, name) for name in ("ranks", "steps", "precision", "flags")}
        shared |= {"model": f"{folder}/model", "data": str(data), "profile": args.profile}
        found: dict[str, list[dict]] = defaultdict(list)
        for _ in range(args.rounds):
            for name, job in jobs.items():
                found[name].append(run(shared | {"folder": folder} | job))
    print(
        f"ms of a step of {MICRO_BATCHES} micro-batches, {args.precision}, {args.ranks} ranks, "
        f"{args.flags or 'default flags'}; medians of {args.rounds} runs\n"
    )
    print("| | " + " | ".join(jobs) + " |" + " times |" * both)
    print("|---" * (len(jobs) + 1 + both) + "|")
    for name in found["compiled" if args.compile else "now"][0]:
        figures = [statistics.median(run[name] for run in found[job]) for job in jobs]
        cells = [f"{figure:.1f}" for figure in figures]
        cells += [f"{figures[-1] / figures[0]:.2f}"] * both
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
