"""python -m pytest tests/data/test_precomputed.py --precompute_reference, and --cache in runs"""

import math
import re
import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from processes import run_ranks
from safetensors.numpy import load_file, save_file
from trainings import (
    assert_same_curve,
    rm_without_picture,
    script,
    train,
    without_picture,
)
from transformers import AutoTokenizer

import train_dpo
from nanoalign.data.encoding import DataSettings
from nanoalign.data.precomputed import KEY, LOGPS, Precomputed, ReferencedRows, precompute
from nanoalign.data.rows import load_rows
from nanoalign.data.split import fingerprint
from nanoalign.distributed import setup
from nanoalign.errors import RunError
from nanoalign.files import checksums
from nanoalign.logps import sequence_logps
from nanoalign.loop import Batcher
from nanoalign.model import Policy
from nanoalign.packing.packed import PackedBatcher

SHARE = ("--eval_share", 0.2)


@pytest.fixture(scope="module")
def plain(llama_folder, pairs, tmp_path_factory):
    """The metrics of a plain run with some flags, which runs once."""
    folder, known = tmp_path_factory.mktemp("plain"), {}

    def run(*flags: object, ranks: int = 1) -> list[dict]:
        if (flags, ranks) not in known:
            out = folder / str(len(known))
            known[flags, ranks] = train(llama_folder, pairs, out, *SHARE, *flags, ranks=ranks)
        return known[flags, ranks]

    return run


# --- runs


def test_a_run_from_a_store_is_the_plain_run(llama_folder, pairs, plain, tmp_path):
    """Bit for bit, on one rank, which makes the store, and on two, which read it."""
    for ranks in (1, 2):
        flags = (*SHARE, "--cache", tmp_path / "cache")
        again = train(llama_folder, pairs, tmp_path / f"{ranks}", *flags, ranks=ranks)
        assert again == plain(ranks=ranks)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_run_may_be_resumed_from_a_store(llama_folder, pairs, plain, tmp_path):
    """The rows in memory and those on disk have the same fingerprint."""
    train(llama_folder, pairs, tmp_path / "run", *SHARE, "--stop_after", 5)
    flags = ("--cache", tmp_path / "cache", "--precompute_reference", "--resume")
    resumed = train(llama_folder, pairs, tmp_path / "run", *SHARE, *flags)
    assert_same_curve(plain(), resumed)


def test_a_reward_model_from_a_store_is_the_plain_one(llama_folder, pairs, tmp_path):
    """--length_debias reads the lengths of all rows."""
    found = [
        train(llama_folder, pairs, tmp_path / name, *SHARE, "--length_debias", *more, steps=4,
              main=rm_without_picture)
        for name, more in (("memory", ()), ("store", ("--cache", tmp_path / "cache")))
    ]  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "ranks", "stored"),
    [
        ("", 2, True),
        ("--loss aot", 2, False),  # a loss of a step as a whole
        ("--no-share_prefix", 1, True),
    ],
)
def test_losses_are_those_of_a_reference_in_memory(
    llama_folder, pairs, plain, tmp_path, flags, ranks, stored
):
    kept = ("--precompute_reference", *(("--cache", tmp_path) if stored else ()))
    flags = flags.split()
    curve = train(llama_folder, pairs, tmp_path / "run", *SHARE, *flags, *kept, ranks=ranks)
    assert_same_curve(plain(*flags), curve)


def test_the_reference_runs_in_the_first_run_alone(llama_folder, pairs, tmp_path):
    argv = ["--model", llama_folder, "--data", pairs, "--steps", 2, *SHARE, "--template", "raw",
            "--batch_size", 7, "--cache", tmp_path / "cache", "--precompute_reference"]  # fmt: skip
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for name, changes, ranks, computed in (
        ("first", (), 1, 2),  # training rows and held-out rows
        ("again", (), 2, 0),
        ("other precision", ("--precision", "bf16"), 1, 2),
        ("other weights", ("--reference", tmp_path / "other"), 1, 2),
    ):
        words = [str(arg) for arg in (*argv, "--out", tmp_path / name, *changes)]
        outcome = run_ranks(ranks, without_picture, words)
        assert outcome.codes == [0] * ranks, outcome.stderr
        assert outcome.stdout.count("responses, computed in") == computed
        assert outcome.stdout.count("responses, read from") == 2 - computed
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 6


def test_no_reference_is_held_in_training(llama_folder, pairs, tmp_path, monkeypatch):
    """The reference is loaded first, and freed before the policy is loaded."""
    loaded, alive, load = [], [], Policy.load

    def watched(*args, **kwargs) -> Policy:
        alive.append([policy() is not None for policy in loaded])
        policy = load(*args, **kwargs)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(train_dpo.Policy, "load", watched)
    monkeypatch.setattr(train_dpo.result, "finish", lambda *args: None)
    argv = ["--model", llama_folder, "--data", pairs, "--steps", 1, *SHARE, "--out",
            tmp_path / "run", "--cache", tmp_path / "cache", "--precompute_reference"]  # fmt: skip
    train_dpo.main([str(arg) for arg in argv])
    assert alive == [[], [False]]


# --- the values, against an oracle


def data_of(folder: Path, pairs: Path, cache: Path | None):
    """The data of a run in memory or, with a cache, on disk."""
    settings = DataSettings(
        [str(pairs)], eval_share=0.2, max_length=60, template="raw", cache=cache
    )
    return load_rows(settings, AutoTokenizer.from_pretrained(folder), folder, setup())


def loader(folder: Path, batcher: Batcher) -> Callable[[], Policy]:
    """What loads the reference in a folder, which is to read the batches."""

    def load() -> Policy:
        policy = Policy.load(folder, trainable=False)
        batcher.prepare(policy)
        return policy

    return load


def arguments(cache: Path, **changes) -> Namespace:
    default = {"cache": cache, "reference": None, "model": "M", "batch_size": 7, "beta": 0.1}
    return Namespace(**default | changes)


@pytest.mark.parametrize(("layout", "stored"), [(Batcher, False), (PackedBatcher, True)])
def test_values_are_textbook_logps_of_separate_sequences(
    llama_folder, pairs, tmp_path, layout, stored
):
    data = data_of(llama_folder, pairs, tmp_path / "cache" if stored else None)
    batcher, model = layout(setup(), 300), tiny_llama()
    load, args = loader(llama_folder, batcher), arguments(tmp_path / "cache")
    found, reference = precompute(load, llama_folder, data, batcher, args)
    assert (found.counts, found.template) == (data.counts, data.template)
    for before, rows in zip(data[:2], found[:2], strict=True):
        assert len(rows) == len(before) > 3 and fingerprint(rows) == fingerprint(before)
        for row, own in zip(rows, before, strict=True):
            assert row.name == own.name and row.pairs == own.pairs
            assert list(row.extra) == ["margins", KEY] and row.extra[KEY].dtype == np.float32
            for response, logp in zip(row.responses, row.extra[KEY], strict=True):
                tokens = torch.from_numpy(np.concatenate([row.prompt, response])).long()[None]
                labels = tokens.clone()
                labels[0, : len(row.prompt)] = -100
                with torch.no_grad():
                    expected = sequence_logps(model(input_ids=tokens).logits, labels)
                assert logp == pytest.approx(expected.item(), rel=1e-5)
    batch = batcher.collate([found.rows[3], found.rows[0]])
    expected = np.concatenate([found.rows[3].extra[KEY], found.rows[0].extra[KEY]])
    assert reference(batch).tolist() == expected.tolist()


def test_rows_with_values_are_a_sequence(llama_folder, pairs, tmp_path):
    """By index from either end, by slice; lengths and limits are those of the rows."""
    for cache in (None, tmp_path / "cache"):
        rows = data_of(llama_folder, pairs, cache).rows
        counts = [len(row.responses) for row in rows]
        ends = np.cumsum([0, *counts])
        found = ReferencedRows(rows, np.arange(ends[-1], dtype=np.float32), ends)
        assert [row.extra[KEY].tolist() for row in found[3:5]] == [[6, 7], [8, 9]]
        assert found[-1].extra[KEY].tolist() == [ends[-1] - 2, ends[-1] - 1]
        assert [row.name for row in found] == [row.name for row in rows]
        with pytest.raises(IndexError):
            found[len(rows)]
        for name in ("lengths", "limits"):
            assert hasattr(found, name) == hasattr(rows, name) == (cache is not None)


# --- what is refused


@pytest.mark.parametrize(
    "more",
    ["--loss simpo", "--loss kto", "--ld_alpha 0.5", "--sync_reference_every 2"],
)
def test_what_needs_the_reference_otherwise_is_refused(more):
    with pytest.raises(RunError, match="--precompute_reference runs the reference once, but"):
        train_dpo.parse_args(["--precompute_reference", *more.split()])


@pytest.fixture
def computed(llama_folder, pairs, tmp_path):
    """A cache with the values of a reference, and the flags of a run that reads it."""
    data = data_of(llama_folder, pairs, None)
    batcher = PackedBatcher(setup(), 300)
    load, args = loader(llama_folder, batcher), arguments(tmp_path / "cache")
    precompute(load, llama_folder, data, batcher, args)
    files = sorted((tmp_path / "cache" / "reference").iterdir())
    assert len(files) == 2
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", *SHARE,
            "--max_length", 60, "--template", "raw", "--batch_size", 7, "--steps", 3,
            "--cache", tmp_path / "cache", "--precompute_reference"]  # fmt: skip
    return files, [str(arg) for arg in argv]


def test_values_are_compared_with_those_that_the_reference_computes(computed, tmp_path):
    """A file with other values of some responses stops the run, with its name."""
    files, argv = computed
    for path in files:
        logps = load_file(path / LOGPS)["logps"]
        save_file({"logps": logps + np.float32(0.5)}, path / LOGPS)
        checksums.write(path, checksums.checksums([path / LOGPS]))
    with pytest.raises(RunError, match="^the precomputed log-probabilities in .* differ .* remove"):
        train_dpo.main(argv)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_damaged_file_is_one_line(computed):
    files, argv = computed
    for path in files:
        (path / LOGPS).write_bytes((path / LOGPS).read_bytes()[:-4])
    outcome = run_ranks(2, script, argv)
    assert outcome.codes == [1, 1] and "Traceback" not in outcome.stderr
    (error,) = [line for line in outcome.stderr.splitlines() if line.startswith("error")]
    assert re.search("are damaged: .* not as it was written .*; remove this folder", error)


def test_a_reference_is_checked_before_it_is_run(llama_folder, pairs, tmp_path):
    """One that knows fewer positions than rows have, and one of broken weights: nothing is kept."""
    short, broken = tiny_llama(max_position_embeddings=16), tiny_llama()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    for name, model, message in (
        ("short", short, f"--reference {tmp_path / 'short'} knows 16 positions"),
        ("broken", broken, "are its weights complete?"),
    ):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", *SHARE,
                "--reference", tmp_path / name, "--cache", tmp_path / "cache", "--template", "raw",
                "--precompute_reference"]  # fmt: skip
        with pytest.raises(RunError, match=re.escape(message)):
            train_dpo.main([str(arg) for arg in argv])
    assert not (tmp_path / "cache" / "reference").exists()


def test_a_cache_that_can_not_be_written_is_known_before_values_are_computed(
    llama_folder, pairs, tmp_path
):
    (tmp_path / "reference").write_text("")
    data = data_of(llama_folder, pairs, None)
    policy = Policy.load(llama_folder, trainable=False)
    batcher = PackedBatcher(setup(), 300)
    batcher.all = None
    with pytest.raises(RunError, match="reference' can't be written: .*; give another --cache"):
        precompute(lambda: policy, llama_folder, data, batcher, arguments(tmp_path))


# --- the check of the first step


def test_rewards_at_the_start_are_checked_with_a_precomputed_reference(
    llama_folder, pairs, tmp_path, monkeypatch
):
    """Values that are off by more than rounding stop the run, whatever the loss makes of them."""
    argv = ["--model", llama_folder, "--data", pairs, "--steps", 1, *SHARE, "--template", "raw",
            "--cache", tmp_path / "cache", "--precompute_reference", "--beta", 1]  # fmt: skip
    monkeypatch.setattr(train_dpo.result, "finish", lambda *args: None)

    def run(out: str, added: float, *more: str) -> None:
        """A run whose reference gives values that are `added` too large."""
        monkeypatch.setattr(Precomputed, "__call__", lambda self, batch: batch.extra[KEY] + added)
        train_dpo.main([str(arg) for arg in (*argv, "--out", tmp_path / out, *more)])

    run("exact", 0.0)
    run("rounded", 1e-3)
    for more in ((), ("--loss", "ipo_sum")):
        with pytest.raises(RunError, match="self-check: with policy == reference, .* rewards up"):
            run("wrong", 0.1, *more)
    assert [path.name for path in (tmp_path / "wrong").iterdir()] == [".lock"]


def test_tolerances_at_the_start_by_hand(llama_folder, pairs, tmp_path):
    """beta times 1e-4 nats a token, for the longest response of the first batch and 5 more."""
    data = data_of(llama_folder, pairs, None)
    lengths = [max(map(len, row.responses)) for row in data.rows]
    batcher = Batcher(setup(), 300)
    for size, beta in ((1, 0.1), (7, 0.5), (7, None)):
        args = arguments(tmp_path, batch_size=size, beta=beta)
        load = loader(llama_folder, batcher)
        reference = precompute(load, llama_folder, data, batcher, args)[1]
        assert reference.tolerances[0] == math.inf
        expected = (beta or 1) * 1e-4 * (max(lengths[:size]) + 5)
        assert reference.tolerances[1] == pytest.approx(expected)
    assert max(lengths[:1]) < max(lengths[:7])
