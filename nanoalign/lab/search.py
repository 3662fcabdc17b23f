"""Searches for text with a high reward, by the gradient of the reward.

    python -m nanoalign.lab.search --model runs/rm --data pairs.jsonl --out runs/attacked.jsonl

The responses of the data, in its key `response`, are changed token by token: the gradient of the
reward with respect to the embeddings says, to first order, what each token at each place would gain
(Ebrahimi et al. 2018, arXiv 1712.06751); of the most promising changes the one with the highest
reward is made (Zou et al. 2023, arXiv 2307.15043). With --suffix a few tokens are sought that are
appended to every response, the same for all.

Shapes: B responses, T tokens, V vocabulary, D width.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from nanoalign.data.templates import encode_records
from nanoalign.distributed import run
from nanoalign.errors import RunError
from nanoalign.flags import Parser, number
from nanoalign.ranks import report
from nanoalign.records import Record
from nanoalign.weights.folders import load_tokenizer


class Target:
    """A reward model, as transformers has it, and the tokens that a search may use."""

    def __init__(self, folder: str):
        self.tokenizer = load_tokenizer(Path(folder))
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.model.requires_grad_(False)
        self.table = self.model.get_input_embeddings().weight  # (V, D)
        # special tokens, and those of bytes that are no text by themselves, stay out of the text
        vocabulary = range(len(self.tokenizer))
        texts = [self.tokenizer.decode([token]) for token in vocabulary]
        special = set(self.tokenizer.all_special_ids)
        self.allowed = torch.tensor(
            [
                token not in special and texts[token].isascii() and texts[token].isprintable()
                for token in vocabulary
            ]
        )

    def encode(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the response with its EOS, as in training."""
        record = Record(prompt, (response,), (), name=prompt)
        (row,) = encode_records([record], self.tokenizer, 1024, "pku")
        return row.prompt.tolist(), row.responses[0].tolist()

    @torch.no_grad()
    def rewards(self, tokens: Tensor) -> Tensor:
        """The rewards of sequences of one length: (B, T) -> (B,)."""
        return self.model(input_ids=tokens, use_cache=False).logits[:, 0]

    def gains(self, tokens: Tensor) -> Tensor:
        """What each token at each place would gain, to first order: (T,) -> (T, V)."""
        embedded = self.table[tokens].clone().requires_grad_()  # (T, D)
        reward = self.model(inputs_embeds=embedded[None], use_cache=False).logits[0, 0]
        (gradient,) = torch.autograd.grad(reward, embedded)
        gains = gradient @ self.table.T  # (T, V)
        gains = gains - gains.gather(1, tokens[:, None])
        return gains.masked_fill(~self.allowed, -torch.inf)


def changed(tokens: Tensor, places: Tensor, gains: Tensor, tried: int) -> Tensor:
    """Some sequences with one token changed: (T,) -> (n, T), n about `tried`.

    places: (P,) in the sequence. gains: (P, V) of the tokens there. Each place is tried with its
    most promising tokens: all of them at one place, which seems best, are often of no use.
    """
    each = max(1, tried // len(places))
    chosen = gains.topk(each, dim=1).indices  # (P, each)
    candidates = tokens.repeat(len(places) * each, 1)
    candidates[torch.arange(len(candidates)), places.repeat_interleave(each)] = chosen.flatten()
    return candidates


def attacked(target: Target, prompt: str, response: str, edits: int, tried: int) -> str:
    """The response after at most so many changes of a token, each the best of `tried`."""
    before, after = target.encode(prompt, response)
    places = torch.arange(len(before), len(before) + len(after) - 1)  # without the EOS
    tokens = torch.tensor(before + after)
    reward = target.rewards(tokens[None])[0]
    for _ in range(edits):
        gains = target.gains(tokens)[places]
        candidates = changed(tokens, places, gains, tried)
        rewards = target.rewards(candidates)
        if rewards.max() <= reward:
            break
        reward, tokens = rewards.max(), candidates[rewards.argmax()]
    return target.tokenizer.decode(tokens[len(before) : -1])


def universal_suffix(
    target: Target, texts: Sequence[tuple[str, str]], length: int, rounds: int, tried: int
) -> str:
    """Tokens that raise the mean reward of all responses most when they are appended."""
    heads = [target.encode(prompt, response) for prompt, response in texts]
    rows = [torch.tensor(before + after[:-1]) for before, after in heads]
    end = torch.tensor(heads[0][1][-1:])
    (start,) = target.tokenizer(" the", add_special_tokens=False)["input_ids"][:1]
    suffix = torch.full((length,), start)

    def mean_reward(suffixes: Tensor) -> Tensor:  # (n, length) -> (n,)
        ends = torch.cat([suffixes, end.repeat(len(suffixes), 1)], 1)
        each = [target.rewards(torch.cat([row.repeat(len(ends), 1), ends], 1)) for row in rows]
        return torch.stack(each).mean(0)

    reward = mean_reward(suffix[None])[0]
    for _ in range(rounds):
        gains = torch.stack(
            [target.gains(torch.cat([row, suffix, end]))[len(row) : -1] for row in rows]
        ).mean(0)  # (length, V)
        candidates = changed(suffix, torch.arange(length), gains, tried)
        rewards = mean_reward(candidates)
        if rewards.max() <= reward:
            break
        reward, suffix = rewards.max(), candidates[rewards.argmax()]
    return target.tokenizer.decode(suffix)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add, count = parser.add_argument, number(int, 1)
    add("--model", required=True, help="the folder of a reward model with one output")
    add("--data", type=Path, required=True, help="a .jsonl file of prompt and response")
    add("--edits", type=count, default=8, help="changes of a token of a response, at most")
    add("--tried", type=count, default=48, help="changes whose reward is computed, for each made")
    add(
        "--suffix",
        type=count,
        metavar="TOKENS",
        help="seek a suffix on the first responses, and append it to the others; default: edits of "
        "each response",
    )
    add("--suffix_texts", type=count, default=24, help="how many responses it is sought on")
    add("--out", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    lines = [json.loads(line) for line in args.data.read_text().splitlines()]
    texts = [(line["prompt"], line["response"]) for line in lines]
    target = Target(args.model)
    if args.suffix:
        sought, texts = texts[: args.suffix_texts], texts[args.suffix_texts :]
        if not texts:
            raise RunError(f"--data {args.data} has only the {len(sought)} texts of the search")
        suffix = universal_suffix(target, sought, args.suffix, args.edits, args.tried)
        print(f"suffix      {suffix!r}")
        found = [(prompt, response + suffix) for prompt, response in texts]
    else:
        found = [(p, attacked(target, p, r, args.edits, args.tried)) for p, r in texts]
    records = [
        {"prompt": prompt, "response": response, "attacked": text}
        for (prompt, response), (_, text) in zip(texts, found, strict=True)
    ]
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"saved       {args.out}: {len(records):,} responses")


if __name__ == "__main__":
    run(main, report.report)
