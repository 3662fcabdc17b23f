"""Commands of the lab that are parsed by the scripts and faked: a reward model is the ground truth.

So each experiment runs in a second, and what it computes is known: a reward model orders answers as
the rule does, and a policy answers as tiny-b.
"""

import json
from argparse import Namespace
from pathlib import Path
from random import Random

import evaluate
import train_dpo
import train_rm
from nanoalign.lab import rloo, runs, search
from nanoalign.lab.figures import chosen_and_rejected, read
from nanoalign.tiny import world

TRAINING = {"train_dpo.py": train_dpo, "train_rm.py": train_rm}


def parsed(words: list[str]) -> Namespace:
    """The arguments of a command of a script. Raises RunError if the script refuses them."""
    if words[0] in TRAINING:
        return TRAINING[words[0]].parse_args(words[1:])
    (args,) = evaluate.parse_args(words[1:])
    return args


class FakeRuns(runs.Runs):
    """parsed: the arguments of all commands, in their order."""

    def __init__(self, made: Path):
        super().__init__(made)
        self.parsed = []

    def _start(self, stem: Path, texts: list[str]) -> None:
        if texts[0] == "-m":
            module = {"nanoalign.lab.search": search, "nanoalign.lab.rloo": rloo}[texts[1]]
            getattr(self, module.__name__.rpartition(".")[2])(module.parse_args(texts[2:]))
        else:
            args = parsed(texts)
            self.parsed.append(args)
            for flag in ("model", "reference", "policy", "baseline", "reward"):
                name = getattr(args, flag, None)
                assert name in (None, "tiny", "none") or Path(name).is_dir(), (flag, name)
            name = texts[1] if texts[0] == "evaluate.py" else "train"
            getattr(self, name)(args, Path(args.out))
        runs.done(stem).write_text("60.0")

    def train(self, args, out: Path) -> None:
        assert all(source.startswith("tiny") or read(Path(source)) for source in args.data)
        out.mkdir()
        lines = [{"step": 0, "eval/loss": 9.0}, {"step": 9, "eval/loss": abs(args.lr - 5e-4)}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def rm(self, args, out: Path) -> None:
        lines = []
        for source in args.data:
            subset, _, path = source.partition("=")
            for n, record in enumerate(read(Path(path))):
                for side, response in sides(record, args.preference or "better"):
                    score = world.true_reward(record["prompt"], response)
                    lines.append({"pair_id": f"{subset}:{n}", "subset": subset, "side": side,
                                  "prompt": record["prompt"], "response": response,
                                  "score": score})  # fmt: skip
        out.mkdir()
        (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def policy(self, args, out: Path) -> None:
        lines, pairs = [], []
        for n, record in enumerate(read(Path(args.data[0]))):
            prompt = record["prompt"]
            for side in ("policy", "baseline"):
                answers = [
                    world.respond(
                        world.SOURCES["tiny-b"], world.prompts()[prompt],
                        Random(f"{getattr(args, side)} {args.seed} {prompt} {k}"),
                    )
                    for k in range(args.samples)
                ]  # fmt: skip
                lines += [{"id": f"p:{n}", "prompt": prompt, "side": side, "answer": answer,
                           "score": world.true_reward(prompt, answer), "tokens": len(answer),
                           "log_ratio": 1.0 + args.seed + 0.01 * n}
                          for answer in answers]  # fmt: skip
            pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[-1]})
        out.mkdir()
        (out / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if args.pairs_out:
            Path(args.pairs_out).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def score(self, args, out: Path) -> None:
        lines = [
            {"prompt": line["prompt"], "completion": text,
             "reward": world.true_reward(line["prompt"], text)}
            for source in args.data for line in read(Path(source))
            for text in [line.get("answer", line.get("response"))]
        ]  # fmt: skip
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def suspects(self, args, out: Path) -> None:
        (trained,) = [each for each in self.parsed if each.out == args.runs[0]]
        assert trained.fold == "1/2" and all(Path(name).is_dir() for name in args.runs)
        out.mkdir()
        shares = ("wrong_share", "true_wrong_share", "true_wrong_share_of_first_tenth")
        (out / "metrics.json").write_text(json.dumps(dict.fromkeys(shares, 0.2)))
        records = read(Path(trained.data[0]))
        pairs = [chosen_and_rejected(record) | {"probability": 0.5} for record in records]
        (out / "suspects.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        if args.cleaned:
            Path(args.cleaned).write_text("".join(json.dumps(each) + "\n" for each in records))

    def rloo(self, args) -> None:
        assert args.reward == "rule" or Path(args.reward).is_dir()
        args.out.mkdir()

    def search(self, args) -> None:
        lines = read(args.data)[args.suffix_texts if args.suffix else 0 :]
        lines = [line | {"attacked": f"{line['response']} zyx"} for line in lines]
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def sides(record: dict, preference: str) -> list[tuple[str, str]]:
    if "chosen" in record:
        return [(side, record[side]) for side in ("chosen", "rejected")]
    first = record[f"{preference}_response_id"]
    return [("chosen", record[f"response_{first}"]), ("rejected", record[f"response_{1 - first}"])]
