"""Writes the data and the language model of the embedded world again.

python -m nanoalign.lab.make_tiny data      train.jsonl and test.jsonl: the same bytes each time
python -m nanoalign.lab.make_tiny model     trains the model: half an hour on two cores
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nanoalign.batch import Row
from nanoalign.data.templates import encode_records
from nanoalign.distributed import run
from nanoalign.flags import Parser
from nanoalign.loop import get_lr
from nanoalign.model import TINY, Policy
from nanoalign.packing.attention import use_tree_attention
from nanoalign.packing.packed import collate
from nanoalign.ranks import report
from nanoalign.records import Record
from nanoalign.tiny import world
from nanoalign.weights.write import change_json

MAX_LENGTH = 1024  # tokens of a prompt and one answer
EVALUATED_ROWS = 50  # of a forward
BATCH_SIZE = 8  # prompts of a step, with 3 answers each
LR = 2.5e-3  # the peak learning rate


def make_data() -> None:
    """Writes the pairs, and prints how accurately their labels can be predicted at best."""
    for path, split in ((world.TRAIN, "train"), (world.TEST, "test")):
        records = world.records(split)
        path.write_text(world.to_jsonl(records), encoding="ascii", newline="\n")
        ceiling, agreement = world.label_ceiling(records), world.oracle_accuracy(records)
        print(
            f"{path.name}: {len(records)} pairs; the best expected accuracy is {ceiling:.3f}, "
            f"that of the ground truth on these labels {agreement:.3f}"
        )


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with all 256 bytes in its alphabet, so that it round-trips any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A $B",
        special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About a million parameters, in few and wide layers.

    In equal time two layers of 192 learned more than four of 128: the world needs memory rather
    than depth. A deviation of the initial weights above the usual 0.02 gave a lower loss.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_rows(
    split: str, per_source: int, epoch: int, tokenizer: PreTrainedTokenizerFast
) -> list[Row]:
    """The prompts of a split, each with `per_source` answers of the three sources, as rows."""
    corpus = world.sft_corpus(split, per_source, epoch)
    records = [Record(prompt, answers, name=str(i)) for i, (prompt, answers) in enumerate(corpus)]
    return encode_records(records, tokenizer, MAX_LENGTH, "pku")


def load_policy(model: LlamaForCausalLM) -> Policy:
    """A policy of the model, which reads packed rows."""
    use_tree_attention(model)
    return Policy(model)


def scored_tokens(rows: list[Row]) -> int:
    return sum(len(response) for row in rows for response in row.responses)


@torch.no_grad()
def mean_loss(policy: Policy, rows: list[Row]) -> float:
    """The loss of all rows, in nats a token."""
    parts = [rows[i : i + EVALUATED_ROWS] for i in range(0, len(rows), EVALUATED_ROWS)]
    return -sum(policy(collate(part)).sum().item() for part in parts) / scored_tokens(rows)


def make_model(out: Path, steps: int = 3000, vocabulary: int = 1536) -> None:
    """Trains the tokenizer and the model on answers of the three assistants; writes both to `out`.

    vocabulary: tokens of the tokenizer. Prints the loss of held-out answers, in nats a token.
    """
    torch.manual_seed(0)
    texts = [
        text for prompt, answers in world.sft_corpus("train", 1) for text in (prompt, *answers)
    ]
    tokenizer = make_tokenizer(texts, vocabulary)
    policy = load_policy(LlamaForCausalLM(make_config(tokenizer)))
    held_out = make_rows("test", 1, 0, tokenizer)
    print(f"{policy.count_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")

    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    queue: list[Row] = []
    epoch = 0
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        if len(queue) < BATCH_SIZE:
            queue = make_rows("train", 1, epoch, tokenizer)
            np.random.default_rng((0, epoch)).shuffle(queue)
            epoch += 1
        rows, queue = queue[:BATCH_SIZE], queue[BATCH_SIZE:]
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, steps, LR, warmup=0.05, schedule="cosine")
        loss = -policy(collate(rows)).sum() / scored_tokens(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 300 == 299 or step == steps - 1:
            held_out_loss = mean_loss(policy, held_out)
            progress.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{held_out_loss:.3f}")

    # bfloat16 halves the file: 2 MB. The printed loss is that of the rounded weights.
    model = policy.model.to(torch.bfloat16)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    change_json(settings, {"tokenizer_class": "PreTrainedTokenizerFast"})  # also in transformers 4
    print(f"{out}: {mean_loss(Policy(model.float()), held_out):.3f} nats a token, held out")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m nanoalign.lab.make_tiny")
    commands = parser.add_subparsers(dest="command", required=True)
    doc = "Writes train.jsonl and test.jsonl."
    commands.add_parser("data", doc=doc, help=doc)
    doc = "Trains the tokenizer and the language model."
    model = commands.add_parser("model", doc=doc, help=doc)
    model.add_argument("--out", type=Path, default=TINY, help="the folder to write")
    args = parser.parse_args(argv)
    if args.command == "data":
        make_data()
    else:
        make_model(args.out)


if __name__ == "__main__":
    run(main, report.report)
