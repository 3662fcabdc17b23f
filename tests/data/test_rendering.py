"""python -m pytest tests/data/test_rendering.py"""

import signal
import threading
import time

import pytest
from conftest import byte_tokenizer
from jinja2 import TemplateError

from nanoalign.data import templates
from nanoalign.data.templates import encode_records
from nanoalign.errors import RunError
from nanoalign.records import Record

MESSAGES = [{"role": "user", "content": "Hi"}]
INNER = "{% for j in range(99999) %}{% set x = i * j %}{% endfor %}"
LOOP = f"{{% for i in range(99999) %}}{INNER}{{% endfor %}}"


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for x in range(10**11) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'x' * 10**14 }}", "MemoryError"),
        ("{{ 'x' * 20000001 }}", "it writes 20,000,001 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ messages[9]['content']['x'] }}", "is undefined|has no element"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        (LOOP, "it takes more than 0.2 seconds"),
    ],
)
def test_what_a_template_does_is_one_error(template, message, monkeypatch):
    """Of the record that it is applied to; and the alarm is off again."""
    if template == LOOP:  # the others end by themselves, also on a busy machine
        monkeypatch.setattr(templates, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    record = Record("Hi", ("Hello.", "No."), name="data:3")
    with pytest.raises(RunError, match=f"^data:3: the chat template fails: .*({message})"):
        encode_records([record], with_template(template), 64, "chat")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_quick_template_is_as_it_was():
    tokenizer = with_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert templates.renderer(tokenizer)(MESSAGES) == "<user>Hi"


def test_other_threads_have_no_alarm_and_render_all_the_same():
    found = []
    apply = templates.renderer(with_template("{{ messages[0].content }}"))
    thread = threading.Thread(target=lambda: found.append(apply(MESSAGES)))
    thread.start()
    thread.join()
    assert found == ["Hi"]


def test_the_time_limit_is_one_of_a_dialogue(monkeypatch):
    """Not of a data set."""
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    apply = templates.renderer(with_template("{{ messages[0].content }}"))
    for _ in range(4):
        apply(MESSAGES)
        time.sleep(0.1)
    with pytest.raises(TemplateError):
        templates.renderer(with_template(LOOP))(MESSAGES)
