"""python -m pytest tests/core/test_scripts.py

Errors of train_dpo.py: one clear line on any number of ranks, and no file touched; torchrun.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny_llama, write_pairs
from processes import run_ranks
from trainings import damaged_model, metrics_of, script

import train_dpo
import train_rm
from nanoalign.errors import RunError

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder) -> Path:
    """A folder with a model, good pairs, bad files, damaged models and an old run."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(llama_folder, folder / "model")
    write_pairs(folder / "pairs.jsonl", 12)
    write_pairs(folder / "others.jsonl", 12, seed=1)
    (folder / "broken.jsonl").write_text(json.dumps(PAIR) + '\n{"prompt": oops}\n')
    (folder / "same.jsonl").write_text(json.dumps(PAIR | {"rejected": "c"}) + "\n")
    damaged_model(llama_folder, folder / "other architecture", "other architecture")
    damaged_model(llama_folder, folder / "no eos", "")
    byte_tokenizer(eos_token=None).save_pretrained(folder / "no eos")
    tiny_llama(vocab_size=300).save_pretrained(folder / "other vocabulary")
    larger = byte_tokenizer()
    larger.add_tokens(["<more>"])
    larger.save_pretrained(folder / "other vocabulary")
    tiny_llama(vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(
        folder / "few ids"
    )
    tiny_llama(max_position_embeddings=16).save_pretrained(folder / "few positions")
    for name in ("few ids", "few positions"):
        byte_tokenizer().save_pretrained(folder / name)
    outcome = run_ranks(1, script, argv(folder, "old run", "--stop_after", 1))
    assert outcome.codes == [0], outcome.stderr
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("mine")
    return folder


def argv(folder: Path, out: str, *flags: object) -> list[str]:
    """A run of 2 steps; later flags win over these."""
    base = ["--model", folder / "model", "--data", folder / "pairs.jsonl", "--template", "raw",
            "--batch_size", 4, "--steps", 2, "--out", folder / out]  # fmt: skip
    return [str(arg) for arg in [*base, *flags]]


# Name -> (--out, flags, a pattern of the message). Names of files and folders are those of `world`.
BAD_INPUT = {
    "missing file": ("new", "--data missing.jsonl", "data file '.*missing.jsonl' does not exist"),
    "broken line": ("new", "--data broken.jsonl", r"broken\.jsonl:2: not valid JSON"),
    "equal responses": ("new", "--data same.jsonl --eval_share 0", "no pairs are left to train on"),
    "no EOS": ("new", "--model no_eos", "the tokenizer has no EOS token"),
    "other architecture": ("new", "--model other_architecture", "not those of the GPT2LMHeadModel"),
    "other vocabulary": ("new", "--reference other_vocabulary", "has another vocabulary"),
    "few ids": ("new", "--model few_ids", r"pairs:\d+: has the token id 258, but --model .* 200"),
    "few positions": ("new", "--model few_positions", "16 positions; give --max_length 16 or less"),
    "old run": ("old run", "", "contains another run; continue it with --resume, replace it"),
    "foreign folder": ("full", "--overwrite", "contains files that are not those of a run"),
    "model's folder": ("model", "--overwrite", "is the folder of a model that this run reads"),
    "resume and overwrite": ("old run", "--resume --overwrite", "give one of them"),
    "resume, other data": ("old run", "--resume --data others.jsonl", "training pairs are not tho"),
    "resume, other batch": ("old run", "--resume --batch_size 5", "--batch_size was 4, now 5"),
    "batch of 0": ("new", "--batch_size 0", "expected a whole number of at least 1, got '0'"),
    "shards of 3": ("new", "--shard_size 3", "--shard_size 3 does not divide the [12] ranks"),
    "unknown flag": ("new", "--batchsize 3", "unrecognized arguments: --batchsize"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p): b"" if p.name == ".lock" else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_clear_error_and_loses_nothing(world, ranks, subtests):
    """Exit code 1, one line in all on standard error, no traceback, no file touched."""
    before = contents(world)
    paths = {path.name.replace(" ", "_"): path for path in world.iterdir()}
    paths["missing.jsonl"] = world / "missing.jsonl"
    for name, (out, flags, message) in BAD_INPUT.items():
        with subtests.test(name):
            words = [str(paths.get(word, word)) for word in flags.split()]
            outcome = run_ranks(ranks, script, argv(world, out, *words))
            assert outcome.codes == [1] * ranks, outcome.stderr
            lines = outcome.stderr.splitlines()
            assert len(lines) == 1, outcome.stderr
            assert lines[0].startswith("error: ")
            assert re.search(message, lines[0]), lines[0]
    assert contents(world) == before


def test_torchrun(world, tmp_path):
    """The real launcher: two ranks train; a bad flag ends it with code 1 and one line of ours."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def torchrun(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *launcher, train_dpo.__file__, *flags]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)

    good = torchrun(*argv(world, "torchrun", "--out", str(tmp_path / "run")))
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    bad = torchrun(*argv(world, "bad", "--batch_size", "0"))
    assert bad.returncode == 1
    assert bad.stderr.count("error: argument --batch_size: expected a whole number") == 1
    assert 'train_dpo.py", line' not in bad.stderr  # no traceback of a worker


@pytest.mark.parametrize("main", [train_dpo.main, train_rm.main])
def test_help_shows_every_flag_with_its_default(main):
    """Every flag has a help with its default, or with the word where that depends on others."""
    outcome = run_ranks(2, _help, main)
    assert outcome.codes == [0, 0], outcome.stderr
    assert outcome.stdout.count("usage: ") == 1  # of rank 0
    _, *flags = re.split(r"\n  (?=-)", outcome.stdout)
    texts = {re.match(r"-+(\w+)", text)[1]: " ".join(text.split()) for text in flags}
    assert len(texts) > 30 and "micro_batch_tokens" in texts and "save_every" in texts
    assert [name for name, text in texts.items() if "default" not in text] == ["h"]
    assert "(default: None)" not in outcome.stdout


@pytest.mark.parametrize("name", ["\x1b[31m", "a\rb", "\x9bm", "\x08"])
def test_a_flag_with_control_characters_is_refused(name):
    """Names of files and models are printed, and controls would move the cursor of the terminal."""
    with pytest.raises(RunError) as error:
        train_dpo.parse_args(["--data", "a.jsonl", name])
    assert str(error.value).startswith(repr(name)) and str(error.value).isprintable()
    assert train_dpo.parse_args(["--out", "größe 数\u3000\t\n"]).out == "größe 数\u3000\t\n"


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=lambda script: script.__name__)
def test_help_shows_the_flags_of_the_core_first(script, capsys):
    """On two screens; it names the groups of the other flags."""
    pages = []
    for words in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            script.parse_args(words)
        pages.append(capsys.readouterr().out)
    first, everything = (set(re.findall(r"^  (--\w+)", page, flags=re.MULTILINE)) for page in pages)
    assert 15 < len(first) <= 25 and first < everything and len(pages[0].splitlines()) <= 100
    assert "--share_prefix" not in first and "--share_prefix" in everything
    groups = pages[0].partition("--help all also explains the flags of\n")[2].split("\n\n")[0]
    assert {"packing", "checkpoints", "many ranks"} <= {*map(str.strip, groups.splitlines())}
    for group in groups.splitlines():
        assert f"\n{group.strip()}:\n" in pages[1]


def test_help_does_not_import_the_models_of_transformers():
    """Which takes a second, of about three in all."""
    code = "import sys, train_dpo, train_rm; print('transformers.modeling_utils' in sys.modules)"
    root = Path(train_dpo.__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def _help(main) -> None:
    try:
        main(["--help", "all"])
    except SystemExit as ended:
        assert ended.code == 0


def _train_without_held_out(argv: list[str]) -> None:
    for name, main in (("dpo", train_dpo.main), ("rm", train_rm.main)):
        main([*argv, "--eval_share", "0", "--out", f"{argv[-1]} {name}"])


def test_nothing_is_evaluated_where_nothing_is_held_out(world):
    """Neither are training pairs, of which as many are evaluated as are held out."""
    outcome = run_ranks(1, _train_without_held_out, argv(world, "no held-out"))
    assert outcome.codes == [0], outcome.stderr
    assert outcome.stdout.count("held out    no records") == 2
    for name in ("dpo", "rm"):
        lines = metrics_of(world / f"no held-out {name}")
        assert [line["step"] for line in lines] == [1, 2]
        assert not any("eval" in key for line in lines for key in line)
