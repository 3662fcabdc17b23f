"""The embedded world: data of a known truth and a small language model, so that all works offline.

world.py, tables.py        the world: its prompts, its three simulated sources, true_reward
train.jsonl, test.jsonl    preference pairs in PKU-SafeRLHF's format: 3000 and 600
model/                     tokenizer and pretrained language model, about a million parameters

python -m nanoalign.tiny.make_data                  writes train.jsonl and test.jsonl again
python -m nanoalign.tiny.make_model                 trains model/ again
python -m nanoalign.tiny.sample --model runs/dpo    samples a trained policy, for its true gain
"""

from pathlib import Path

from nanoalign import TINY as MODEL  # noqa: F401

FOLDER = Path(__file__).parent
TRAIN = FOLDER / "train.jsonl"
TEST = FOLDER / "test.jsonl"
