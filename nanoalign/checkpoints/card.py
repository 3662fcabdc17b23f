"""The model card: README.md of a result, as the Hugging Face Hub shows it."""

import json
import re
import shlex
from pathlib import Path

import jinja2  # a package that torch needs, too

from nanoalign.checkpoints.hub import public_name
from nanoalign.checkpoints.runs import ARGS
from nanoalign.hosts import launcher
from nanoalign.hosts.terminal import visible

CARD = "README.md"
CARD_MARK = "<!-- Written by nanoalign."


def write_card(out: Path, lines: list[dict], records: int, is_reward_model: bool) -> None:
    """Writes the model card by card.jinja, unless there is one that was not written here."""
    path = out / CARD
    if path.exists() and CARD_MARK not in path.read_text():
        return
    run = json.loads((out / ARGS).read_text())
    lines = [line for line in lines if "eval/loss" in line]
    found = (re.match(r"(?:[^/=]+=)?hf://datasets/([^/]+/[^/@:]+)", name) for name in run["data"])
    command = shlex.join([*launcher(run["ranks"]), Path(run["argv"][0]).name, *run["argv"][1:]])
    tokenizer = [path.read_text() for path in out.glob("chat_template.jinja")]
    tokenizer += [path.read_text() for path in out.glob("tokenizer_config.json")]
    template = Path(__file__).with_name("card.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        run=run, base=public_name(run["model"]), is_reward_model=is_reward_model, records=records,
        first=lines[0] if lines else None, last=lines[-1] if lines else None,
        datasets=sorted({match[1] for match in found if match}), command=command,
        has_chat_template=len(tokenizer) > 1 or '"chat_template"' in tokenizer[0],
    )  # fmt: skip
    path.write_text(visible(text))
