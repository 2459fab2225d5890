"""What the exit code of an entry point says, for those who start it and decide whether to start it again."""

from __future__ import annotations

import signal

MISTAKE = 1  # something that the user must mend, told in words
INPUT_MISSING = 3  # an earlier phase's output is not there (yet)
FOR_THE_USER = (MISTAKE, 2, INPUT_MISSING)  # starting again would change nothing; 2 is Python's own

# An exception that nobody foresaw, in one process of several: most often another process has gone. Start all again.
BROKEN = 70

# SIGTERM, after which the state was saved; what a shell gives for a process that SIGTERM has ended. Start all again.
PREEMPTED = 128 + signal.SIGTERM
