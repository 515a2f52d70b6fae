"""Restores the default handling of SIGINT for all tests."""

from __future__ import annotations

import signal

# A shell that runs the tests in its background has SIGINT ignored, and every process that a test starts would inherit
# that: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
