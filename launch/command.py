"""The frame of every entry point: gin's flags rewritten for absl, devices started, and errors told in words.

What a user got wrong (ValueError, OSError) is one message and exit_codes.MISTAKE; `--verbosity=1` adds the traceback. What
we got wrong keeps its traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, logging

from launch import devices, exit_codes, gin_config


def run(main: Callable[[devices.Processes], None]) -> None:
    """Parses the command line, starts devices, and calls `main` with who takes part."""
    app.run(lambda argv: _main(main, argv), flags_parser=_parse_flags)


def _tell_retries(joined: devices.Processes) -> None:
    storage = sys.modules.get("merging.checkpoints.storage")  # else nothing was read
    if storage is not None and (count := storage.retried_requests()):
        by = f" of {joined.name}" if joined.count > 1 else ""
        print(
            f"{count:,} requests{by} to object storage failed and were made again", file=sys.stderr
        )


def quiet_libraries() -> None:
    """seqio and Orbax tell of each of their steps: only their warnings are shown, unless --verbosity asks for more."""
    if logging.get_verbosity() == logging.INFO:
        logging.set_verbosity(logging.WARNING)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(gin_config.rewrite_arguments(argv))
    except ValueError as error:
        sys.exit(str(error))


def _main(main: Callable[[devices.Processes], None], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    joined = devices.Processes()
    try:
        joined = devices.start_from_flags()
        main(joined)
        _tell_retries(joined)
    except (ValueError, OSError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            traceback.print_exc()
        where = f" ({joined.name})" if joined.count > 1 else ""
        print(f"Error{where}: {error}", file=sys.stderr)
        devices.end(exit_codes.MISTAKE, joined)
