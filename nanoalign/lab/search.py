"""Searches for text with a high reward, by the gradient of the reward.

    python -m nanoalign.lab.search --model runs/rm --data pairs.jsonl --out runs/attacked.jsonl

A response of the data (key `response`) is changed token by token. The gradient of the reward with
respect to the embeddings estimates, to first order, the gain of each token at each place (Ebrahimi
et al. 2018, arXiv 1712.06751). The rewards of the most promising changes are computed, and the best
of them is kept (Zou et al. 2023, arXiv 2307.15043). --suffix searches for a few tokens that raise
the mean reward when they are appended to every response.

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

TRIED = 48  # changes, for each one that is kept


class Target:
    """A reward model, loaded by transformers, and the tokens that a search may use."""

    def __init__(self, folder: str):
        self.tokenizer = load_tokenizer(Path(folder))
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.model.requires_grad_(False)
        self.table = self.model.get_input_embeddings().weight  # (V, D)
        # not special tokens, and not those of bytes that are no text by themselves
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
        """The tokens of the prompt, and of the response with its EOS, as in training."""
        record = Record(prompt, (response,), (), name=prompt)
        (row,) = encode_records([record], self.tokenizer, 1024, "pku")
        return row.prompt.tolist(), row.responses[0].tolist()

    @torch.no_grad()
    def rewards(self, tokens: Tensor) -> Tensor:
        """The rewards of sequences of one length: (B, T) -> (B,)."""
        return self.model(input_ids=tokens, use_cache=False).logits[:, 0]

    def gains(self, tokens: Tensor) -> Tensor:
        """The gain of reward by each token at each place, to first order: (T,) -> (T, V).

        It is -inf for tokens that a search may not use.
        """
        embedded = self.table[tokens].clone().requires_grad_()  # (T, D)
        reward = self.model(inputs_embeds=embedded[None], use_cache=False).logits[0, 0]
        (gradient,) = torch.autograd.grad(reward, embedded)
        gains = gradient @ self.table.T  # (T, V)
        gains = gains - gains.gather(1, tokens[:, None])
        return gains.masked_fill(~self.allowed, -torch.inf)


def candidates_of(tokens: Tensor, places: Tensor, gains: Tensor) -> Tensor:
    """About TRIED sequences in which one token is changed: (T,) -> (n, T).

    places: (P,) in the sequence. gains: (P, V) of the tokens there. Every place is tried, with its
    most promising tokens: the estimates of the place that seems best are often all wrong.
    """
    per_place = max(1, TRIED // len(places))
    replacements = gains.topk(per_place, dim=1).indices  # (P, per_place)
    candidates = tokens.repeat(len(places) * per_place, 1)
    changed = places.repeat_interleave(per_place)
    candidates[torch.arange(len(candidates)), changed] = replacements.flatten()
    return candidates


def attacked(target: Target, prompt: str, response: str, edits: int) -> str:
    """The response after at most `edits` changes of a token, each the best of TRIED."""
    before, after = target.encode(prompt, response)
    places = torch.arange(len(before), len(before) + len(after) - 1)  # without the EOS
    tokens = torch.tensor(before + after)
    reward = target.rewards(tokens[None])[0]
    for _ in range(edits):
        gains = target.gains(tokens)[places]
        candidates = candidates_of(tokens, places, gains)
        rewards = target.rewards(candidates)
        if rewards.max() <= reward:
            break
        reward, tokens = rewards.max(), candidates[rewards.argmax()]
    return target.tokenizer.decode(tokens[len(before) : -1])


def universal_suffix(
    target: Target, texts: Sequence[tuple[str, str]], length: int, rounds: int
) -> str:
    """`length` tokens that raise the mean reward of all (prompt, response) when appended, as text.

    rounds: at most, each of which changes a token to the best of TRIED candidates.
    """
    heads = [target.encode(prompt, response) for prompt, response in texts]
    rows = [torch.tensor(before + after[:-1]) for before, after in heads]
    end = torch.tensor(heads[0][1][-1:])
    (start,) = target.tokenizer(" the", add_special_tokens=False)["input_ids"][:1]
    suffix = torch.full((length,), start)

    def mean_reward(suffixes: Tensor) -> Tensor:  # (n, length) -> (n,)
        ends = torch.cat([suffixes, end.repeat(len(suffixes), 1)], 1)
        rewards = [target.rewards(torch.cat([row.repeat(len(ends), 1), ends], 1)) for row in rows]
        return torch.stack(rewards).mean(0)

    reward = mean_reward(suffix[None])[0]
    for _ in range(rounds):
        gains = torch.stack(
            [target.gains(torch.cat([row, suffix, end]))[len(row) : -1] for row in rows]
        ).mean(0)  # (length, V)
        candidates = candidates_of(suffix, torch.arange(length), gains)
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
    add("--edits", type=count, default=8, help="how many tokens of a response are changed, at most")
    add(
        "--suffix",
        type=count,
        metavar="TOKENS",
        help="search for a suffix of so many tokens on the first responses, and append it to the "
        "others; default: edits of each response",
    )
    add("--suffix_texts", type=count, default=24, help="how many responses --suffix is searched on")
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
            raise RunError(
                f"--data {args.data} has {len(sought)} responses, on which --suffix is searched; "
                f"give more, or a smaller --suffix_texts than {args.suffix_texts}"
            )
        suffix = universal_suffix(target, sought, args.suffix, args.edits)
        print(f"suffix      {suffix!r}")
        results = [response + suffix for _, response in texts]
    else:
        results = [attacked(target, *text, args.edits) for text in texts]
    records = [
        {"prompt": prompt, "response": response, "attacked": text}
        for (prompt, response), text in zip(texts, results, strict=True)
    ]
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"saved       {args.out}: {len(records):,} responses")


if __name__ == "__main__":
    run(main, report.report)
