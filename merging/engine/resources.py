"""How much memory this process holds, as the operating system counts it."""

from __future__ import annotations

import math
import re
import time

SECONDS_BETWEEN_LOOKS = 0.02  # one takes 0.1 ms; buffers live through a whole pass


class PeakResident:
    """The highest RssAnon + RssShmem seen at the times it looked: memory that is ours, not the page cache's."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._last = -math.inf
        self.look()

    def look(self) -> None:
        """Takes a look, unless the last was a moment ago."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LOOKS:
            self.nbytes, self._last = max(self.nbytes, resident_bytes()), now


def resident_bytes() -> int:
    """RssAnon + RssShmem now; 0 where the system has no /proc."""
    try:
        with open("/proc/self/status") as status:
            kib = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status.read(), re.MULTILINE)
    except OSError:
        return 0
    return sum(map(int, kib)) * 1024
