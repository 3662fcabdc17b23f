"""Estimates of DPO on many GPUs, on paper: what a step computes, sends and waits for.

    python benchmarks/scaling.py

Nothing here is measured. Of one GPU and a micro-batch of t tokens, s of them scored, on G GPUs with
C copies of the parameters in S shards each; B parameters of the blocks, H of the head, R of head
and embedding:

    compute     operations: 8 B t + 8 H s. A parameter has 2 a token in a forward pass, 4 in a
                backward one, and 2 in the forward pass of the reference. Running blocks again
                (--activation_checkpointing) adds 2 B t. Attention, 2 % at 233 tokens a row, is not
                counted.
    gather      bytes: 2 (3 B + 2 R). Parameters in bfloat16: blocks twice for the policy, the rest
                once, because it stays for the backward pass, and all once for the reference.
    reduce      bytes: 4 (B + R). Gradients in float32.
    all-reduce  bytes, once a step: 2 (C - 1) / C * 4 (B + R) / S. Gradients between the copies.

Gathering and reducing go around a ring of S ranks, so (S - 1) / S of the bytes come to each GPU: in
a host over NVLink. Where a copy spans hosts each byte enters a host once, over one of its 8 network
cards. That is 4 times a block and 3 times for the rest, with S - 1 hops each. The shard of a GPU is
all-reduced over its own card. All this happens one after another, while the GPU computes; a step of
one micro-batch takes as long as the longer of both.
"""

import math
from dataclasses import dataclass

PEAK, SHARE_OF_PEAK = 989e12, 0.5  # operations a second, bfloat16; what kernels reach of it
NVLINK, CARD, GPUS_A_HOST = 450e9, 50e9, 8  # bytes a second, in one direction; 900 GB/s is both
REACHED = 0.8  # of these, by NCCL
HOP = {True: 2e-6, False: 5e-6}  # seconds, in a host and where a ring spans hosts
TOKENS, SCORED = 233, 100  # of a pair of HH-RLHF in one row; tokens of its responses
MICRO_BATCH, PAIRS = 8192, 8  # --micro_batch_tokens; pairs of a GPU in a small step
MEMORY = 60e9  # bytes of 80 GB for parameters, gradients and moments; the rest is activations


@dataclass
class Model:
    layers: int
    width: int
    inner: int
    keys: int  # width of all key heads
    vocabulary: int
    recomputes: bool  # --activation_checkpointing

    @property
    def blocks(self) -> int:
        attention = 2 * self.width * (self.width + self.keys)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def rest(self) -> int:  # embedding and head
        return 2 * self.head

    def compute(self, tokens: float) -> float:
        """Seconds of a micro-batch."""
        operations = (10 if self.recomputes else 8) * self.blocks + 8 * self.head * SCORED / TOKENS
        return operations * tokens / (PEAK * SHARE_OF_PEAK)


MODELS = {
    "8B": Model(32, 4096, 14336, 1024, 128256, recomputes=False),
    "70B": Model(80, 8192, 28672, 1024, 128256, recomputes=True),
}


HEADS = (
    "model", "GPUs", "shards", "state, GB", "gather + reduce, GB", "s", "all-reduce, GB", "s",
    f"compute of {MICRO_BATCH:,} tokens, s", f"of peak with {PAIRS} pairs a GPU",
    "tokens a GPU for half", "--batch_size",
)  # fmt: skip


def main() -> None:
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for name, model in MODELS.items():
        for gpus in (64, 1024):
            for shards in (8, 64, 1024):
                if shards <= gpus:
                    cells = [name, f"{gpus:,}", f"{shards:,}", *estimate(model, gpus, shards)]
                    print(f"| {' | '.join(cells)} |")


def estimate(model: Model, gpus: int, shards: int) -> list[str]:
    """The cells of a row of the table, from the state on."""
    parameters, copies = model.blocks + model.rest, gpus // shards
    state = 18 * parameters / shards  # 4 + 4 + 8 in float32, 2 of the reference
    if state > MEMORY:
        return [f"{state / 1e9:.0f}", "does not fit", *["-"] * (len(HEADS) - 5)]
    moved = 2 * (3 * model.blocks + 2 * model.rest) + 4 * parameters
    moved *= (shards - 1) / shards
    in_host = shards <= GPUS_A_HOST
    speed = NVLINK if in_host else CARD * GPUS_A_HOST
    hops = (4 * model.layers + 3) * (shards - 1)
    ring = moved / (speed * REACHED) + hops * HOP[in_host]
    reduced = 2 * (copies - 1) / copies * 4 * parameters / shards
    between = reduced / (CARD * REACHED)
    network, small = ring + between, model.compute(PAIRS * TOKENS)
    tokens = network / model.compute(1)
    return [
        f"{state / 1e9:.1f}",
        f"{moved / 1e9:.0f}",
        f"{ring:.2f}",
        f"{reduced / 1e9:.1f}",
        f"{between:.2f}",
        f"{model.compute(MICRO_BATCH):.2f}",
        f"{100 * SHARE_OF_PEAK * small / max(small, network):.0f} %",
        f"{tokens:,.0f}",
        f"{math.ceil(tokens / TOKENS) * gpus:,}",
    ]


if __name__ == "__main__":
    main()
