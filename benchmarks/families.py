"""Which families of causal language models train: a tiny random model of each in transformers.

    python benchmarks/families.py                   all, about 20 minutes
    python benchmarks/families.py llama mamba       some of them

A step of DPO with packed rows, one with --no-share_prefix, and one of a reward model, with the
checks that precede each; and the logits of a policy that was saved, with tied and untied heads.
Each family runs in a process of its own, for --seconds at most. Lists of families are printed; the
errors are in the table runs/families.md.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import train_dpo
import train_rm
from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.model import TINY, Policy
from nanoalign.packing.self_check import one_line_errors
from nanoalign.weights.slices import read_slices
from nanoalign.weights.write import write_model

WAYS = ("packed", "separate", "reward model", "saved")
# Sizes by the names that configs give them; a name that a config does not have is left out.
SIZES = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embedding_size": 64,
    "n_inner": 128, "intermediate_size": 128, "ffn_dim": 128, "ffn_hidden_size": 128, "d_ff": 128,
    "decoder_ffn_dim": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
    "max_position_embeddings": 512, "n_positions": 512, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_d_ssm": 128, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip

# Kinds of layers that the default config of a family does not name.
MIXES = {"lfm2": ["conv", "full_attention"], "lfm2_moe": ["conv", "full_attention"]}


def write_model_of(family: str, folder: Path, tied: bool) -> Path:
    """A small model of a family, with random weights and the embedded tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    kind = transformers.CONFIG_MAPPING[family]
    has = kind().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in has}
    if "qk_rope_head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]  # there the width of what is rotated
    layers = MIXES.get(family) or list(dict.fromkeys(has.get("layer_types") or []))
    if layers:  # one of each kind, and two at least
        layers = layers * (1 + (len(layers) == 1))
        sizes["num_hidden_layers"] = len(layers)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    config = kind(
        **sizes,
        **tokens,
        **({"layer_types": layers} if layers else {}),
        pad_token_id=None,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(family: str, folder: Path) -> dict[str, str]:
    """Way -> "ok", or the line that it ends with."""
    untied, tied = (write_model_of(family, folder / str(tie), tie) for tie in (False, True))
    flags = ["--model", str(untied), "--steps", "1", "--batch_size", "4", "--data", "tiny:test",
             "--eval_share", "0", "--template", "pku", "--out"]  # fmt: skip
    plain = ["--no-share_prefix"]
    packed = attempt(train_dpo.main, [*flags, str(folder / "packed")])
    separate = attempt(train_dpo.main, [*flags, str(folder / "separate"), *plain])
    layout = [] if packed == "ok" else plain
    reward = attempt(train_rm.main, [*flags, str(folder / "reward"), *layout])
    saved = [attempt(same_logits, model, folder / "saved") for model in (untied, tied)]
    return dict(zip(WAYS, (packed, separate, reward, max(saved, key="ok".__ne__)), strict=True))


def same_logits(model: Path, folder: Path) -> None:
    """Raises RunError unless a model that we read and wrote has the logits that it had."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    ids = torch.arange(20, 40)[None]
    policy = Policy.load(model, read=read_slices)
    write_model(policy, tokenizer, folder)
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval()
        for each in (model, folder)
    )
    with torch.no_grad(), one_line_errors("the model", "not compared"):
        logits = [
            each(input_ids=ids, use_cache=False).logits for each in (before, policy.model, after)
        ]
    off = max((logits[0] - each).abs().max().item() for each in logits[1:])
    if not off <= 1e-5:
        raise RunError(f"logits differ by {off:.2g}")


def attempt(run: Callable[..., None], *args: object) -> str:
    """ "ok", or the error of a run in one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run(*args)
    except RunError as error:
        return re.sub(r"(--)?model (folder )?'?/\S+?'?:? ", "", str(error))
    except Exception as error:  # the user would see a traceback
        return f"TRACEBACK {in_a_line(error)}"
    return "ok"


def child(family: str, results) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results.send(check(family, Path(folder)))
        except Exception as error:  # no such small model
            results.send(dict.fromkeys(WAYS, f"no small model: {in_a_line(error)}"))


def run(family: str, seconds: float) -> dict[str, str]:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=child, args=(family, theirs))
    process.start()
    try:
        ready = ours.poll(seconds)
        return ours.recv() if ready else dict.fromkeys(WAYS, f"longer than {seconds:g} s")
    except EOFError:
        return dict.fromkeys(WAYS, "the process died")
    finally:
        process.kill()
        process.join()


LISTS = {
    "every way": "Train in every way",
    "separate": "Train with --no-share_prefix, which the error of packed rows names",
    "policy": "Train as a policy with --no-share_prefix, but not as a reward model",
    "refused": "Are refused before the first step, by the self-check or another error",
    "untried": "Not tried: a small config is not accepted, or takes too long",
}


def kind_of(ways: dict[str, str]) -> str:
    """The list that a family belongs to."""
    bad = {way for way, line in ways.items() if line != "ok"}
    if any(line.startswith(("no small model", "longer than")) for line in ways.values()):
        return "untried"
    if bad & {"separate", "saved"}:
        return "refused"
    if "reward model" in bad:
        return "policy"
    return "separate" if bad else "every way"


def summary(results: dict[str, dict[str, str]]) -> str:
    """Markdown: the families by what they do."""
    paragraphs = []
    for kind, text in LISTS.items():
        names = [name for name, ways in results.items() if kind_of(ways) == kind]
        line = f"{text} ({len(names)} of {len(results)}): {', '.join(names) or 'none'}."
        paragraphs.append(textwrap.fill(line, 120, break_on_hyphens=False))
    return "\n\n".join(paragraphs)


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each family that does not train in every way, with its errors."""
    lines = [f"| | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for name, ways in results.items():
        if kind_of(ways) != "every way":
            cells = [" ".join(ways[way].split())[:110].replace("|", "/") for way in WAYS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="as transformers names them; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each family")
    parser.add_argument("--table", type=Path, default=Path("runs/families.md"), help="of errors")
    args = parser.parse_args()
    results = {}
    for name in args.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[name] = run(name, args.seconds)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(table(results) + "\n")
    print(summary(results))


if __name__ == "__main__":
    main()
