"""Chat templates as functions that end: they are code of a model, and may loop or grow for ever.

transformers runs them in jinja's sandbox, which keeps them from files and other code, not from time
and memory.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jinja2 import TemplateError

from nanoalign.errors import in_a_line

SECONDS = 5.0  # of one dialogue; it takes less than a thousandth of that
LETTERS = 20_000_000  # of its text


def renderer(tokenizer, **options: object) -> Callable[..., str]:
    """Messages -> their text by the chat template of a tokenizer. options: of apply_chat_template.

    Raises TemplateError whatever goes wrong.
    """

    def apply(messages: list[dict], **more: object) -> str:
        try:
            with ended_after(SECONDS):
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options, **more)
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(in_a_line(error)) from error
        if len(text) > LETTERS:
            raise TemplateError(f"it writes {len(text):,} characters")
        return text

    return apply


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raises TemplateError inside after some time; in the main thread alone, which gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TemplateError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
