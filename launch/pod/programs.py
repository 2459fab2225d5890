"""Outside programs, gcloud and kubectl: told before they run, tried again, or only printed."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

# What fails at random here is a connection among hundreds, or a service that has too much to do.
ATTEMPTS = 4
PAUSE_S = 5.0


class ProgramFailed(ValueError):
    """An outside program ended with another code than 0."""


class Programs:
    """Runs programs, or prints them where `is_dry_run`."""

    def __init__(self, *, is_dry_run: bool, sleep: Callable[[float], None] = time.sleep):
        self.is_dry_run = is_dry_run
        self._sleep = sleep

    def run(self, command: Sequence[str], *, stdin: str | None = None, attempts: int = 1) -> None:
        """Runs a program whose output is the user's to read.

        Args:
          command: program and arguments.
          stdin: what it reads.
          attempts: how often it is tried in all, if trying again does no harm.

        Raises:
          ProgramFailed: if the last one fails.
        """
        if self.is_dry_run:
            print(shlex.join(command))
            if stdin is not None:
                print(stdin, end="")
            return
        self._try(command, stdin=stdin, attempts=attempts, is_captured=False)

    def ask(
        self, command: Sequence[str], *, attempts: int = ATTEMPTS, supposed: str | None = None
    ) -> str:
        """What a program writes to stdout; in a dry run what is `supposed`."""
        if self.is_dry_run:
            print(shlex.join(command))
            return supposed or ""
        return self._try(command, stdin=None, attempts=attempts, is_captured=True)

    def pause(self, seconds: float) -> None:
        """Waits, but not in a dry run."""
        if not self.is_dry_run:
            self._sleep(seconds)

    def _try(
        self, command: Sequence[str], *, stdin: str | None, attempts: int, is_captured: bool
    ) -> str:
        print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
        for attempt in range(1, attempts + 1):
            try:
                done = subprocess.run(
                    command,
                    input=stdin,
                    stdin=None if stdin is not None else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if is_captured else None,
                    text=True,
                )
            except FileNotFoundError:
                raise ProgramFailed(
                    f"{command[0]} is not on the PATH: install it, see WORKSPACE.md, `From gcloud auth to a report`"
                ) from None
            if not done.returncode:
                return done.stdout or ""
            failed = f"{' '.join(command[:5])} ... ended with exit code {done.returncode}"
            if attempt < attempts:
                pause = PAUSE_S * 2 ** (attempt - 1)
                print(f"{failed}; again in {pause:.0f} s", file=sys.stderr, flush=True)
                self._sleep(pause)
        told = f" after {attempts} attempts" if attempts > 1 else ""
        raise ProgramFailed(f"{failed}{told}; what it said stands above")
