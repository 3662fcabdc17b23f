"""Limits of what a chat template computes, which comes with a model that somebody else has made.

Jinja's sandbox keeps a template from files and from code, but not from 10**10**8: an alarm rings
between two instructions of Python, and a call of C is one. So numbers are limited before they are
computed, and the memory that a template may take is limited by the system.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from jinja2 import TemplateError, pass_environment
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

BITS = 2**14  # of an integer
MEMORY = 2**29  # bytes that a template may take; the text that it writes has at most 20 million


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, whose integers have a largest size."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.filters |= {"sum": total, "round": rounded, "int": integer}

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if isinstance(right, int):
            if isinstance(left, int):
                check_bits(left.bit_length() * (max(right, 1) if operator == "**" else 1))
            check_bits(right.bit_length())
        return self.binop_table[operator](left, right)


def check_bits(bits: int) -> None:
    """Raises TemplateError for an integer of more than BITS bits."""
    if bits > BITS:
        raise TemplateError(f"it computes with an integer of more than {BITS:,} bits")


@pass_environment
def total(
    environment: LimitedEnvironment,
    iterable: Iterable,
    attribute: str | int | None = None,
    start: object = 0,
) -> object:
    """Jinja's filter `sum`, as a loop of Python: that of lists takes squared time in one call."""
    get = make_attrgetter(environment, attribute) if attribute is not None else None
    for each in iterable:
        start = start + (get(each) if get else each)
    return start


def integer(value: object, default: int = 0, base: int = 10) -> int:
    """Jinja's filter `int`; of hexadecimal digits Python reads any number."""
    check_bits(4 * len(value) if isinstance(value, str) else 0)
    return FILTERS["int"](value, default, base)


def rounded(value: float, precision: int = 0, method: str = "common") -> float:
    """Jinja's filter `round`, which computes 10**precision."""
    check_bits(4 * abs(precision))
    return FILTERS["round"](value, precision, method)


# transformers makes the environment of its chat templates from this name, and has no argument
# for it.
chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment


@contextmanager
def limits(seconds: float) -> Iterator[None]:
    """Raises TemplateError inside after some time, and MemoryError beyond MEMORY more bytes.

    In the main thread alone, which gets signals; the memory on Linux alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TemplateError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        # Again each second: an error that is raised in a destructor is dropped by Python.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        if sys.platform == "linux":
            most = memory_in_use() + MEMORY
            most = most if soft == resource.RLIM_INFINITY else min(soft, most)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def memory_in_use() -> int:
    """Returns the bytes of the process's address space, on Linux."""
    return int(os.pread(statm(os.getpid()), 20, 0).split()[0]) * resource.getpagesize()


@cache  # to open it takes longer than to render a short dialogue
def statm(pid: int) -> int:
    """Returns a descriptor of the sizes of this process. pid: its own; a fork has others."""
    return os.open("/proc/self/statm", os.O_RDONLY)
