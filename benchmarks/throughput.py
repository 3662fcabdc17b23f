"""Pairs per second and peak memory of DPO and a reward model: nanoalign beside TRL, or alone.

Both train the same model on the same records in the same optimizer steps, with the same precision
and optimizer. nanoalign runs with its defaults. TRL runs without gradient checkpointing, and gets
the records of each step sorted by length, and the micro-batch size with which it is fastest; or it
runs as it comes. Every run is a process of its own, and the runs alternate. The losses must agree.
Records that max_length would cut are left out, because the two cut differently.

    pip install -r requirements-dev.txt
    python benchmarks/throughput.py                              the embedded model and data
    python benchmarks/throughput.py --model FOLDER --data FILE
    python benchmarks/throughput.py --trl_defaults               TRL as it comes
    python benchmarks/throughput.py --only nanoalign             without TRL
    python benchmarks/throughput.py --checkout FOLDER --rounds 7       beside another commit
    python benchmarks/throughput.py --profile                    torch.profiler's table of one step
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_dpo
import train_rm
from nanoalign import batch, loop
from nanoalign.data.formats import formats
from nanoalign.data.sources import read_records
from nanoalign.data.templates import render
from nanoalign.encode import encode_all
from nanoalign.loop import step_indices
from nanoalign.model import Policy, RewardModel
from nanoalign.packing import packed
from nanoalign.weights.folders import load_tokenizer, local_folder
from nanoalign.weights.write import write_model

LR = 1e-4  # constant, so that the second losses differ unless both took the same first step
LOSS_TOLERANCE = 2e-3  # allowed difference of losses in float32; in bfloat16 ten times that
TRL_SIZE = 8  # per_device_train_batch_size, where nothing is set
PEAK_SIZES = (1024, 2048, 4096)  # of square matrices; their products measure the machine's peak


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default="tiny", help="a folder, OWNER/NAME on the Hub, or 'tiny'"
    )
    parser.add_argument("--data", default="tiny", help="preference records, or 'tiny'")
    parser.add_argument("--algorithms", nargs="+", choices=("dpo", "rm"), default=["dpo", "rm"])
    parser.add_argument("--only", choices=("nanoalign", "trl"), help="run one of the two alone")
    parser.add_argument(
        "--checkout",
        metavar="FOLDER",
        help="compare with nanoalign of another commit, in this folder, not with TRL",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="pairs of an optimizer step")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run, after one more")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, alternating")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8],
        help="micro-batch sizes, in pairs, that are tried with TRL",
    )
    parser.add_argument(
        "--trl_defaults",
        action="store_true",
        help="TRL as it comes: 8 pairs, not sorted, gradient checkpointing",
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the table of torch.profiler of a step of nanoalign, and stop",
    )
    parser.add_argument("--flags", default="", help="more flags for nanoalign, in one string")
    return parser.parse_args()


# --- jobs, each in a process of its own -----------------------------------------------------------


def prepare(job: dict) -> dict:
    """Writes the records, and the reward model at the start; counts tokens and operations."""
    folder, model = Path(job["folder"]), local_folder(job["model"])
    tokenizer = load_tokenizer(model)
    plain, texts = [], []
    for record in read_records(formats(), [job["data"]]):
        texts.append(render(record, tokenizer, "auto"))
        plain.append(replace(record, prompt=texts[-1].prompt, responses=texts[-1].responses))
    rows = encode_all(plain, tokenizer, 2**20)
    fitting = [i for i, row in enumerate(rows) if row.longest <= job["max_length"]]
    wanted = (job["steps"] + 2) * job["batch_size"]
    if len(fitting) < wanted:
        raise SystemExit(f"{len(fitting)} records fit max_length, and {wanted} are needed")
    picked = fitting[:wanted]
    with (folder / "records.jsonl").open("w") as file:
        for text in (texts[i] for i in picked):
            chosen, rejected = text.responses
            line = {"prompt": text.prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(line) + "\n")
    write_model(RewardModel.load(model, head_seed=0), tokenizer, folder / "reward_model")
    policy = Policy.load(model)
    flops = {name: 0 for name in ("dpo", "rm")}
    for i in picked:
        body, head = forward_flops(policy, rows[i])
        flops["dpo"] += (3 + 1) * (body + head)  # the policy forward and backward, the reference
        flops["rm"] += 3 * body
    separate = [
        len(rows[i].prompt) + len(response) for i in picked for response in rows[i].responses
    ]
    return {
        "flops": {name: total / len(picked) for name, total in flops.items()},
        "real": sum(len(rows[i]) for i in picked) / len(picked),
        "separate": sum(separate) / len(picked),
        "parameters": policy.count_parameters(),
    }


def forward_flops(policy, row) -> tuple[int, int]:
    """Multiplications and additions of the forward of a row: in the blocks, and in the head.

    Two for every weight of a matrix and token, and four for every pair of a query and a key that it
    attends to, times the width of all heads. Norms, rotations and softmax are not counted.
    """
    config = policy.model.config
    inside = sum(p.numel() for block in policy.blocks() for p in block.parameters() if p.ndim >= 2)
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    prompt, responses = len(row.prompt), [len(response) for response in row.responses]
    seen = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)
    body = 2 * inside * len(row) + 4 * config.num_hidden_layers * width * seen
    return body, 2 * config.vocab_size * config.hidden_size * sum(responses)


def nanoalign(job: dict) -> dict:
    """Runs train_dpo.py or train_rm.py; records when each optimizer step begins."""
    begun, padded = [], [0]
    get_lr, profiler = loop.get_lr, torch.profiler.profile()

    def record_time(*args) -> float:
        _synchronize()
        if job["profile"] and len(begun) in (1, 2):  # the second step
            (profiler.start if len(begun) == 1 else profiler.stop)()
        begun.append(time.perf_counter())
        padded.append(0)
        return get_lr(*args)

    def counting(collate):
        def counted(*args):
            batch = collate(*args)
            padded[-1] += batch.inputs["input_ids"].numel()
            return batch

        return counted

    script = {"dpo": train_dpo, "rm": train_rm}[job["algorithm"]]
    out = Path(job["folder"]) / "run"
    argv = ["--model", _model(job), "--data", f"{job['folder']}/records.jsonl", "--eval_share", "0",
            "--template", "raw", "--max_length", str(job["max_length"]),
            "--batch_size", str(job["batch_size"]), "--steps", str(job["steps"] + 2),
            "--lr", str(LR), "--warmup", "0", "--schedule", "constant", "--overwrite",
            "--precision", job["precision"], "--out", str(out), *job["flags"].split()]  # fmt: skip
    with (
        patch.object(loop, "get_lr", record_time),
        patch.object(loop.Batcher, "collate", staticmethod(counting(batch.collate))),
        patch.object(packed.PackedBatcher, "collate", staticmethod(counting(packed.collate))),
    ):
        script.main(argv)
    if job["profile"]:
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        return {"table": profiler.key_averages().table(sort_by=order, row_limit=20)}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "begun": begun,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "padded": padded[2:-1],
    }


def trl(job: dict) -> dict:
    """Runs TRL's trainer on the records in nanoalign's steps.

    Those of a step are sorted by length, unless TRL is to run as it comes.
    """
    import trl
    from datasets import Dataset

    lines = (Path(job["folder"]) / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    tokenizer = transformers.AutoTokenizer.from_pretrained(_folder(job))
    lengths = [
        max(len(tokenizer(r["prompt"] + r[side])["input_ids"]) for side in ("chosen", "rejected"))
        for r in records
    ]
    order = []
    for step in range(job["steps"] + 1):
        indices = step_indices(step, len(records), job["batch_size"], seed=0).tolist()
        order += indices if job["trl_defaults"] else sorted(indices, key=lambda i: lengths[i])
    if job["algorithm"] == "rm":  # whole texts, which is quicker to prepare
        records = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in records]
    per_rank = job["size"]
    accumulation = job["batch_size"] // (per_rank * job["ranks"])
    config = {
        "output_dir": f"{job['folder']}/trl", "per_device_train_batch_size": per_rank,
        "gradient_accumulation_steps": accumulation, "max_steps": job["steps"] + 1,
        "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "max_length": job["max_length"],
        "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "train_sampling_strategy": "sequential", "bf16": job["precision"] == "bf16",
        "optim": "adamw_torch_fused", "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    config |= {} if job["trl_defaults"] else {"gradient_checkpointing": False}
    kind = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, transformers.AutoModelForCausalLM),
        "rm": (
            trl.RewardTrainer,
            trl.RewardConfig,
            transformers.AutoModelForSequenceClassification,
        ),
    }
    trainer_class, config_class, model_class = kind[job["algorithm"]]
    begun, padded, losses = [], [0], []

    class Recorder(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            _synchronize()
            begun.append(time.perf_counter())
            padded.append(0)

        def on_step_end(self, *args, **kwargs) -> None:
            _synchronize()
            if len(begun) == job["steps"] + 1:
                begun.append(time.perf_counter())

        def on_log(self, *args, logs=None, **kwargs) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = trainer_class(
        model=model_class.from_pretrained(_folder(job), dtype=torch.float32),
        args=config_class(**config),
        train_dataset=Dataset.from_list([records[i] for i in order]),
        processing_class=tokenizer,
        callbacks=[Recorder()],
    )
    training_step = trainer.training_step

    def counted(model, inputs, *args):
        padded[-1] += inputs["input_ids"].numel()
        return training_step(model, inputs, *args)

    trainer.training_step = counted
    trainer.train()
    return {"begun": begun, "losses": [float(loss) for loss in losses], "padded": padded[2:]}


def peak(job: dict) -> dict:
    """Multiplications and additions per second in products of large matrices: the maximum."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    best = 0.0
    for size in PEAK_SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(4):
            _synchronize()
            begun = time.perf_counter()
            a @ b
            _synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return {"peak": best}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _model(job: dict) -> str:
    return f"{job['folder']}/reward_model" if job["algorithm"] == "rm" else job["model"]


def _folder(job: dict) -> Path:
    return local_folder(_model(job))


def _memory() -> int:
    """Peak memory of this process in bytes: of the GPU if there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def work(job: dict) -> None:
    jobs = {"prepare": prepare, "nanoalign": nanoalign, "trl": trl, "peak": peak}
    result = jobs[job["what"]](job)
    rank = os.environ.get("RANK", "0")
    Path(job["folder"], f"result{rank}.json").write_text(json.dumps(result | {"memory": _memory()}))


# --- the comparison -------------------------------------------------------------------------------


def start(what: str, job: dict, root: str | Path = ROOT, **more) -> dict:
    """Runs one job in processes of its own; the result of rank 0, with the memory of all.

    root: the checkout whose benchmarks/throughput.py is run.
    """
    job = {**job, **more, "what": what}
    ranks = job["ranks"] if what in ("nanoalign", "trl") else 1
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    script = Path(root, "benchmarks", "throughput.py").resolve()
    command = [sys.executable, *launcher, str(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    parts = [json.loads(Path(job["folder"], f"result{r}.json").read_text()) for r in range(ranks)]
    return parts[0] | {
        "memory": sum(part["memory"] for part in parts),
        "padded": [sum(step) for step in zip(*(p.get("padded", []) for p in parts), strict=True)],
    }


def pairs_per_second(result: dict, job: dict) -> float:
    """Of the timed steps: all but the first."""
    begun = result["begun"][1:]
    return job["batch_size"] * (len(begun) - 1) / (begun[-1] - begun[0])


def compare(algorithm: str, job: dict, facts: dict) -> None:
    """Runs each side `rounds` times, alternating, and prints a table and the ratios."""
    job = {**job, "algorithm": algorithm}
    sides = {"nanoalign": ("nanoalign", ROOT), "TRL": ("trl", ROOT)}
    if job["checkout"]:
        sides = {"nanoalign": ("nanoalign", ROOT), "checkout": ("nanoalign", job["checkout"])}
    sides = {name: side for name, side in sides.items() if job["only"] in (None, name.lower())}
    if "TRL" in sides:
        tried = {}
        for size in job["sizes"]:
            tried[size] = pairs_per_second(start("trl", job, size=size, steps=1), job)
            print(f"TRL with micro-batches of {size}: {tried[size]:.2f} pairs/s", flush=True)
        job["size"] = max(tried, key=tried.get)
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    peaks = []
    for n in range(job["rounds"]):
        for name in (*sides,) if n % 2 == 0 else (*sides,)[::-1]:
            peaks.append(start("peak", job)["peak"])
            runs[name].append(start(sides[name][0], job, sides[name][1]))
    best = max(peaks)
    print(
        f"\n{algorithm}, {job['rounds']} runs of {job['steps']} timed steps; matrix products reach "
        f"{best / 1e9:,.0f} GFLOP/s\n\n"
        "| | pairs/s | of each run | padded tokens a pair | peak memory, GB | first losses |\n"
        "|---|---|---|---|---|---|"
    )
    for name, results in runs.items():
        speeds = [pairs_per_second(result, job) for result in results]
        padded = sum(results[0]["padded"]) / (len(results[0]["padded"]) * job["batch_size"])
        label = f"TRL, micro-batches of {job['size']}" if name == "TRL" else name
        memory = statistics.median(result["memory"] for result in results) / 1e9
        print(
            f"| {label} | {statistics.median(speeds):.2f} "
            f"| {', '.join(f'{speed:.2f}' for speed in speeds)} | {padded:.0f} | {memory:.3f} "
            f"| {', '.join(f'{loss:.4f}' for loss in results[0]['losses'][:3])} |"
        )
    if "nanoalign" in sides:
        speed = statistics.median(pairs_per_second(result, job) for result in runs["nanoalign"])
        share = facts["flops"][algorithm] * speed / best
        print(
            f"\nnanoalign needs {facts['flops'][algorithm] / 1e9:.2f} GFLOP a pair: "
            f"{share:.1%} of the peak of matrix products"
        )
    if len(sides) == 2:
        print_ratios(runs, job)


def print_ratios(runs: dict[str, list[dict]], job: dict) -> None:
    """Prints how the first side compares with the second; other losses end the program."""
    (_, first), (name, second) = runs.items()
    speeds = [
        pairs_per_second(a, job) / pairs_per_second(b, job)
        for a, b in zip(first, second, strict=True)
    ]
    memory = [statistics.median(result["memory"] for result in side) for side in (first, second)]
    losses = [side[0]["losses"][: job["steps"] + 1] for side in (first, second)]
    off = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"{statistics.median(speeds):.3f} times the pairs/s of {name} ({min(speeds):.3f} to "
        f"{max(speeds):.3f}), {memory[0] / memory[1]:.3f} times its memory; losses differ by at "
        f"most {off:.1e}"
    )
    if off > LOSS_TOLERANCE * (1 if job["precision"] == "fp32" else 10):
        raise SystemExit("the losses do not agree: the two do not train the same")


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        work(json.loads(sys.argv[1]))
        return
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = {**vars(args), "folder": folder}
        job |= {"sizes": [TRL_SIZE]} if args.trl_defaults else {}
        facts = start("prepare", job)
        print(
            f"{args.model}, {facts['parameters']:,} parameters, {args.precision}; a pair has "
            f"{facts['real']:.0f} tokens in a row, {facts['separate']:.0f} as two sequences"
        )
        for algorithm in args.algorithms:
            if args.profile:
                print(start("nanoalign", job, algorithm=algorithm)["table"])
            else:
                compare(algorithm, job, facts)


if __name__ == "__main__":
    main()
