"""python -m pytest tests/data/test_template_limits.py"""

import resource
import sys
import time

import pytest
from conftest import byte_tokenizer
from hostile import HEAVY
from jinja2 import Environment, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from processes import run_ranks

from nanoalign.data.chat_template import ChatTemplate
from nanoalign.data.template_limits import LimitedEnvironment, limits, memory_in_use

MESSAGES = [{"role": "user", "content": "Hi"}]
LISTS = "range(100000) | batch(1) | list"


def chat(template: str) -> ChatTemplate:
    return ChatTemplate(byte_tokenizer(chat_template=template))


@pytest.mark.parametrize("template", HEAVY)
def test_what_would_take_minutes_or_gigabytes_is_an_error(template):
    """Each is one call of C, which no alarm interrupts; the limit of memory is taken back."""
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    with pytest.raises(TemplateError, match="MemoryError|integer of more than 16,384 bits"):
        chat(template).render(MESSAGES)
    assert time.process_time() - start < 10
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_sum_of_lists_can_be_interrupted(monkeypatch):
    """As one call of C it would take hours."""
    monkeypatch.setattr("nanoalign.data.chat_template.SECONDS", 0.5)
    with pytest.raises(TemplateError, match="it takes more than 0.5 seconds"):
        chat(f"{{{{ ({LISTS}) | sum(start=[]) | length }}}}").render(MESSAGES)


def test_an_alarm_that_a_destructor_swallows_rings_again(monkeypatch):
    class Slow:
        def __del__(self):
            time.sleep(0.6)

    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: swallowed.append(about.exc_type))
    with pytest.raises(TemplateError, match="it takes more than 0.3 seconds"), limits(0.3):
        Slow()
        time.sleep(3)
    assert swallowed == [TemplateError]


@pytest.mark.parametrize(
    "expression",
    [
        "[1, 2.5, 4] | sum", "[[1], [2]] | sum(start=[0])", "[{'a': 3}, {'a': 4}] | sum('a')",
        "[[5, 6], [7, 8]] | sum(attribute=1, start=1)", "[] | sum", "42.55 | round",
        "'12' | int, 'ff' | int(base=16), 'x' | int(7), 2.9 | int",
        "42.55 | round(1, 'floor')", "1234 | round(-2)", "7 // 2, 7 % 4, -7 % 4, 2 ** 10, 1 / 4",
        "2 ** -1, 2.0 ** 3, True * 3, 3 * 'ab', '%s-%03d' % ('a', 5), [1] * 2, 10 ** 11",
    ],
)  # fmt: skip
def test_other_values_are_those_of_jinja(expression):
    """The sandbox that transformers has is the reference."""
    found, expected = (
        environment().from_string(f"{{{{ {expression} }}}}").render()
        for environment in (LimitedEnvironment, ImmutableSandboxedEnvironment)
    )
    assert found == expected != ""


def test_the_limits_hold_for_templates_alone():
    assert Environment().from_string("{{ 2 ** 20000 > 1 }}").render() == "True"


def in_a_small_process() -> list[str]:
    """What templates of 1 MB and of 256 MB give where the process may take 128 MB more."""
    limit, found = (memory_in_use() + 2**27, resource.RLIM_INFINITY), []
    resource.setrlimit(resource.RLIMIT_AS, limit)
    for size in (2**20, 2**28):
        try:
            found.append(chat(f"{{{{ ('a' * {size}) | length }}}}").render(MESSAGES))
        except TemplateError as error:
            found.append(str(error))
    return [*found, str(resource.getrlimit(resource.RLIMIT_AS) == limit)]


def test_no_limit_of_memory_is_raised():
    """One that the process was started with stays, and holds in a template."""
    assert run_ranks(1, in_a_small_process).results == [["1048576", "MemoryError", "True"]]
