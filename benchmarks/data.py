"""How long the data of a run take before the first step, and in how much memory.

Records are repeated up to 1,000,000, each with a number in its prompt, so that all differ. They are
encoded into a new cache by some processes, as the training scripts do it, and then read from it as
a second run does.

    python benchmarks/data.py                               the embedded model and data
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

from nanoalign.data.encoding import DataSettings
from nanoalign.data.rows import load_rows
from nanoalign.data.sources import check_sources
from nanoalign.data.split import fingerprint
from nanoalign.distributed import setup
from nanoalign.loop import step_indices
from nanoalign.packing.packed import PackedBatcher
from nanoalign.ranks.collectives import gather
from nanoalign.weights.folders import load_tokenizer, local_folder

BATCH = 64  # pairs of the first step
READ = 10_000  # rows that are read one by one, in random order


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="a folder with a tokenizer, or 'tiny'")
    parser.add_argument("--data", default="tiny", help="a .jsonl of records, or 'tiny'")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="after repeating")
    parser.add_argument("--ranks", type=int, default=2, help="processes that encode")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the job of a process of its own
    return parser.parse_args()


def repeat(source: str, pairs: int, path: Path) -> None:
    """Writes the records of a source, numbered, until there are so many."""
    (original,) = check_sources([source])
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
    """One rank: loads the rows of a run from a store, and plans its first step."""
    world, folder = setup(), local_folder(job["model"])
    settings = DataSettings(
        [job["file"]], eval_share=0.01, max_length=job["max_length"], cache=job["cache"]
    )
    tokenizer, before = load_tokenizer(folder), memory("VmHWM")
    start = time.perf_counter()
    rows = load_rows(settings, tokenizer, folder, world).rows
    opened = time.perf_counter() - start
    fingerprint(rows)
    step = [rows[i] for i in step_indices(0, len(rows), BATCH, seed=0)]
    PackedBatcher(world, 8192).plan(step)
    ready = time.perf_counter() - start
    start = time.perf_counter()
    for i in step_indices(0, len(rows), READ, seed=1):
        rows[i]
    read = (time.perf_counter() - start) / min(READ, len(rows))
    figures = {
        "opened": opened,
        "ready": ready,
        "read": read,
        "before": before,
        "peak": memory("VmHWM"),
        "own": memory("RssAnon"),
        "rows": len(rows),
        "tokens": int(rows.lengths.sum()),
    }
    everyones = gather(figures, world)
    if world.is_main:
        Path(job["result"]).write_text(json.dumps(everyones))


def memory(name: str) -> float:
    """Memory of this process in MiB. VmHWM: its maximum. RssAnon: now, without mapped files."""
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
            f"{first[0]['rows']:,} rows to train on, of {first[0]['tokens'] / 1e6:,.1f} million "
            f"tokens\n"
            f"encoding    {seconds:.1f} s on {args.ranks} ranks, "
            f"{args.pairs / seconds:,.0f} pairs/s\n"
            f"cache       {size / 2**20:,.0f} MiB; the rows of the first step are read from it "
            f"after {max(rank['ready'] for rank in second):.2f} s\n"
            f"rows        {max(rank['read'] for rank in second) * 1e6:.1f} microseconds each, in "
            "random order"
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
