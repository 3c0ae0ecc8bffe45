"""Signals as a person's shell hands them on, whatever the runner does with its own.

A non-interactive shell starts what runs in the background with SIGINT and SIGQUIT ignored, nohup
with SIGHUP ignored; what is ignored stays so over exec, in every program that a test starts.
"""

from __future__ import annotations

import signal


def take_as_usual() -> None:
    """In this process, and so in each program that it starts, no signal is ignored or blocked.

    What was ignored is caught from now on, and dropped: exec puts a caught signal back to its
    default. SIGINT raises KeyboardInterrupt, as in any Python. (SIGPIPE and SIGXFSZ Python ignores
    itself, and subprocess puts back.)"""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in set(signal.Signals) - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
