"""DPO with the defaults of train_dpo.py."""

FLAGS = ""
