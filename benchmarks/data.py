"""How long the data of a run take before its first step, and in how much memory: 1,000,000 pairs by default.

Records are repeated, each with a running number in its prompt, so that all differ. They are encoded into a
new cache by some processes, as the training scripts do it, and then read from it as a second run does.

    python benchmarks/data.py                                           the embedded model and data
    python benchmarks/data.py --model FOLDER --data FILE --ranks 2 --pairs 200000
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCH = 64  # pairs of the first step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="a folder with a tokenizer, or 'tiny'")
    parser.add_argument("--data", default="tiny", help="a .jsonl of records, or 'tiny'")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="after repeating")
    parser.add_argument("--ranks", type=int, default=2, help="processes that encode")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser.parse_args()


def repeat(source: str, pairs: int, path: Path) -> None:
    """Writes the records of a source until there are so many, numbered."""
    from nanoalign.data import files_of

    (original,) = files_of(source)[1]
    records = [json.loads(line) for line in original.read_text().splitlines()]
    with path.open("w") as file:
        for n in range(pairs):
            record = dict(records[n % len(records)])
            for key in ("prompt",) if "prompt" in record else ("chosen", "rejected"):
                opening, human, rest = record[key].rpartition("\n\nHuman:")
                if not human:
                    opening, rest = "", record[key]
                record[key] = f"{opening}{human} {n}: {rest}"
            file.write(json.dumps(record) + "\n")


def work(job: dict) -> None:
    """One rank: encodes, or finds what is encoded; then has the rows of the first step."""
    from transformers import AutoTokenizer

    from nanoalign.cache import Encoding, encoded
    from nanoalign.distributed import gather_lists, setup
    from nanoalign.plan import plan_micro_batches, step_indices
    from nanoalign.weights import resolve_model

    world, folder = setup(), resolve_model(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    how = Encoding(
        [job["file"]], ("better",), False, (), "auto", job["max_length"], tokenizer, folder
    )
    before = memory("VmHWM")
    start = time.perf_counter()
    store = encoded(how, job["cache"], world)
    opened = time.perf_counter() - start
    held_out = store.hold_out(0.01, seed=0)
    rows = store.rows(~held_out)
    rows.fingerprint()
    step = [rows[i] for i in step_indices(0, len(rows), BATCH, seed=0)]
    plan_micro_batches(step, world.size, 8192)
    ready = time.perf_counter() - start
    figures = {
        "opened": opened,
        "ready": ready,
        "before": before,
        "peak": memory("VmHWM"),
        "own": memory("RssAnon"),
        "rows": len(rows),
        "tokens": len(store.arrays["tokens"]),
    }
    everyones = gather_lists([figures], world)
    if world.is_main:
        Path(job["result"]).write_text(json.dumps([rank for (rank,) in everyones]))


def memory(name: str) -> float:
    """Of this process, in MiB: VmHWM, the most it ever held; RssAnon, what it holds but for mapped files."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def run(job: dict, ranks: int) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(ranks), __file__, "--worker", json.dumps(job)]  # fmt: skip
    subprocess.run(command, check=True)
    return json.loads(Path(job["result"]).read_text())


def main() -> None:
    args = parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        repeat(args.data, args.pairs, file)
        job = {
            "model": args.model,
            "file": str(file),
            "cache": f"{folder}/cache",
            "max_length": args.max_length,
            "result": f"{folder}/result.json",
        }
        first, second = run(job, args.ranks), run(job, args.ranks)
        size = sum(path.stat().st_size for path in Path(job["cache"]).rglob("*") if path.is_file())
        seconds = max(rank["opened"] for rank in first)
        print(
            f"pairs       {args.pairs:,} in a file of {file.stat().st_size / 2**20:,.0f} MiB; "
            f"{first[0]['rows']:,} rows to train on, {first[0]['tokens'] / 1e6:,.0f} million tokens in all\n"
            f"encoding    {seconds:.1f} s on {args.ranks} ranks, {args.pairs / seconds:,.0f} pairs/s\n"
            f"cache       {size / 2**20:,.0f} MiB; from it the rows of the first step are there after "
            f"{max(rank['ready'] for rank in second):.2f} s"
        )
        for name, ranks in (("encoding", first), ("reading", second)):
            peaks = ", ".join(
                f"{rank['peak']:,.0f} MiB at most ({rank['before']:,.0f} before; at the end "
                f"{rank['own']:,.0f} but for mapped files)"
                for rank in ranks
            )
            print(f"{'memory':<11} of each rank, {name}: {peaks}")


if __name__ == "__main__":
    main()
