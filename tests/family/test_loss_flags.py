"""python -m pytest tests/family/test_loss_flags.py

Flags of the losses and their add-ons: what is refused, defaults, the help.
"""

import pytest
import torch
from preferences import (  # noqa: F401
    fixture_of_logps,
    fixture_of_models,
    fixture_of_objective_of,
    fixture_of_rows,
    settings,
)

from nanoalign.errors import RunError
from nanoalign.family import losses
from nanoalign.family.losses import FIELDS, LOSSES
from nanoalign.family.objectives import is_used

BAD_FLAGS = {
    "unknown loss": (["--loss", "nope"], r"invalid choice: 'nope' \(choose from .*sigmoid.*aot"),
    "exo_pair at 0": (["--loss", "exo_pair", "--label_smoothing", 0], "must be above 0"),
    "gamma without simpo": (
        ["--loss", "hinge", "--gamma_beta_ratio", 1],
        "no hyperparameter of --loss hinge, .* --beta$",
    ),
    "beta with sft": (["--loss", "sft", "--beta", 0.1], "takes none"),
    "tau of 0": (["--loss", "discopop", "--tau", 0], "a number above 0"),
    "reference with simpo": (["--loss", "simpo", "--reference", "tiny"], "has no reference"),
    "no reference with dpo": (["--reference", "none"], "--loss dpo needs a --reference"),
    "alpha without the divergence": (["--divergence_alpha", 0.5], "belong together"),
    "divergence_alpha of 0": (["--divergence", "alpha", "--divergence_alpha", 0], "at least 1e-06"),
    "divergence_alpha of 1": (["--divergence", "alpha", "--divergence_alpha", 1], "below 1"),
    "ld_alpha of 1": (["--ld_alpha", 1], "below 1"),
    "negative length_alpha": (["--length_alpha", -0.1], "at least 0"),
    "a move every 0 steps": (["--sync_reference_every", 0], "at least 1"),
    "negative nll_weight": (["--nll_weight", -0.1], "at least 0"),
    "mix without when": (["--sync_reference_mix", 0.5], "give both"),
    "too far a mix": (["--sync_reference_every", 2, "--sync_reference_mix", 2], "give 1 or less"),
    "kto of single records": (["--loss", "kto", "--batch_size", 1], "raise --batch_size"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_the_loss_does_not_use_are_errors(case):
    flags, message = BAD_FLAGS[case]
    with pytest.raises(RunError, match=message):
        settings(*flags)


def test_flags_at_their_limits():
    for flags in (
        ["--loss", "kto", "--batch_size", 2],
        ["--sync_reference_every", 1, "--sync_reference_mix", 1],
        ["--loss", "orpo", "--odds_weight", 0],
    ):
        settings(*flags)


def of_the_margin(name: str) -> bool:
    """Whether a constant added to both log-ratios changes nothing."""
    if name == "dpo" or "shift" in FIELDS[name]:
        return name == "dpo"
    values = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.allclose(LOSSES[name](*values), LOSSES[name](*(values + 3)), rtol=1e-9)


ALL = {"dpo", *LOSSES}
OF_MEANS = {name for name in LOSSES if "lengths" in " ".join(FIELDS[name])}
OF_SUMS = {"dpo"} | {name for name in LOSSES if "chosen_logratios" in FIELDS[name]} - OF_MEANS
FITS = {  # by what a loss is a function of: one of means has no sums that an add-on could change
    ("--length_alpha", "0.1"): {name for name in OF_SUMS if of_the_margin(name)},
    ("--divergence", "js"): OF_SUMS,
    ("--ld_alpha", "0.5"): ALL - OF_MEANS - {"kto"},
    ("--wpo",): ALL - {"kto"},
    ("--nll_weight", "1"): ALL,
    ("--sync_reference_every", "2"): OF_SUMS | {"ipo", "sigmoid_norm", "kto", "aot"},
}


@pytest.mark.parametrize("flags", FITS, ids=lambda flags: flags[0])
def test_an_add_on_goes_with_the_losses_that_it_fits(flags):
    accepted = set()
    for name in ("dpo", *LOSSES):
        try:
            settings("--loss", name, *flags)
            accepted.add(name)
        except RunError as error:
            assert f"{flags[0]} does not go with --loss {name}: " in str(error)
    assert accepted == FITS[flags]


def test_defaults_are_those_of_the_papers():
    assert settings("--loss", "simpo").beta == 2.0
    assert settings("--loss", "simpo", "--beta", "1").beta == 1.0
    args = settings("--loss", "kto", "--desirable_weight", 2)
    assert (args.beta, args.desirable_weight, args.undesirable_weight) == (0.1, 2.0, 1.0)
    args = settings("--loss", "sft")
    assert (args.beta, args.label_smoothing, args.reference) == (None, None, "none")
    args = settings()
    assert (args.beta, args.label_smoothing, args.reference) == (0.1, 0.0, None)
    assert settings("--sync_reference_every", 3).sync_reference_mix == 0.6


def test_a_plain_run_needs_nothing_of_the_family():
    assert not is_used(settings()) and not is_used(settings("--label_smoothing", 0.1))
    for flags in (["--loss", "sigmoid"], ["--nll_weight", 0], ["--ld_alpha", 0], ["--wpo"]):
        assert is_used(settings(*flags))


def test_the_help_has_every_hyperparameter_with_its_default(capsys):
    with pytest.raises(SystemExit):
        settings("--help", "all")
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    for name, takes in losses.DEFAULTS.items():
        assert name in text
        for flag, value in takes.items():
            assert f"--{flag}" in text
            assert flag in ("beta", "label_smoothing") or f"{name}, default: {value:g}" in text
    for flag, usual, other in (("beta", 0.1, "simpo 2"), ("label_smoothing", 0, "exo_pair 0.001")):
        start = f"  default of --{flag}: {usual}, but "
        (line,) = [line for line in printed.splitlines() if line.startswith(start)]
        others = line.removeprefix(start).split(", ")
        assert other in others
        expected = {name: takes.get(flag, usual) for name, takes in losses.DEFAULTS.items()}
        assert others == [f"{name} {x:g}" for name, x in expected.items() if x != usual]
