"""Ctrl-C for the tests that send it: a shell that starts pytest in the background leaves it ignored."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
