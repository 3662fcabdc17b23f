"""python -m pytest tests/weights/test_readable.py"""

import json
import re
import shutil
from pathlib import Path

import pytest

from nanoalign.errors import RunError
from nanoalign.weights.folders import load_tokenizer, local_folder


def unfinished(folder: Path, *checkpoints: str, **settings: object) -> Path:
    """The folder of a run that was killed: args.json, and checkpoints."""
    for name in ("", *checkpoints):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"lr": 1e-6} | settings))
    return folder


COMMAND = ["train_dpo.py", "--data", "my pairs.jsonl", "--stop_after=3", "--save_every", "5"]


@pytest.mark.parametrize(
    ("argv", "checkpoints", "message"),
    [
        (COMMAND, ["step_000003"],
         "continue it: python train_dpo.py --data 'my pairs.jsonl' --save_every 5 --resume"),
        (["train_rm.py", "--stop_after", "3", "--overwrite"], ["step_000003"],
         "continue it: python train_rm.py --resume"),
        (["train_rm.py", "--resume"], ["step_000003"], "continue it: python train_rm.py --resume"),
        (COMMAND, [".step_000003.partial"], "it has no checkpoint; train it again, with --overwrit"
         "e"),
    ],
)  # fmt: skip
def test_a_run_that_has_not_finished_is_no_model(tmp_path, argv, checkpoints, message):
    folder = unfinished(tmp_path / "run", *checkpoints, argv=argv)
    with pytest.raises(RunError) as error:
        local_folder(folder)
    assert str(error.value) == f"the run in '{folder}' has not finished; {message}"


def test_a_run_of_several_ranks_continues_on_as_many(tmp_path):
    folder = unfinished(tmp_path / "run", "step_000003", argv=["train_rm.py"], ranks=8)
    with pytest.raises(RunError, match=r"it: torchrun --nproc_per_node 8 train_rm\.py --resume$"):
        local_folder(folder)


@pytest.mark.parametrize("settings", ['{"files": []}', "{", "[]", None])
def test_another_folder_may_be_no_model_at_all(tmp_path, settings):
    """The results of an evaluation, which have an args.json too; a damaged one."""
    if settings is not None:
        (tmp_path / "args.json").write_text(settings)
    with pytest.raises(
        RunError, match=re.escape("has no config.json; is it a Hugging Face model?")
    ):
        local_folder(tmp_path)


@pytest.mark.parametrize(("file", "settings"), [
    ("tokenizer_config.json", {"model_max_length": [1]}),
    ("config.json", {"architectures": [3]}),
    ("config.json", {"num_attention_heads": "x"}),
])  # fmt: skip
def test_settings_of_other_types_are_errors_of_one_line(llama_folder, tmp_path, file, settings):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | settings))
    with pytest.raises(RunError, match="has no readable tokenizer|config.json: "):
        load_tokenizer(local_folder(folder))
