"""Google's object storage as fsspec reads and writes it: requests that stall are given up, and what fails is counted.

Retries are the clients': gcsfs makes a request again where a connection breaks or stalls, or the answer is 408, 429 or 5xx,
with backoff; tensorstore, which writes Orbax's arrays and databases, does as much. By itself gcsfs waits for an answer for
ever.
"""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
import gcsfs
from gcsfs.retry import is_retriable, retry_request

# Without a connection, or without a byte.
SECONDS_OF_SILENCE = 60.0
# Of a request, with pauses of 1, 2, 4, ... 32 s between them: a minute and a half in all.
ATTEMPTS = 8

_retried = 0  # written by the one thread that fsspec's clients share


def retried() -> int:
    """Requests of this process, gcsfs' and tensorstore's, that failed in a way that has them made again.

    Not among them: what HTTP's client sends once more because the connection it had kept turns out to be closed.
    """
    return _retried + _retried_by_tensorstore()


class FileSystem(gcsfs.GCSFileSystem):
    """gcsfs' client, patient for so long only, and counting; `storage` tells fsspec of it."""

    def __init__(self, *arguments: Any, **settings: Any):
        silence = aiohttp.ClientTimeout(
            total=None, sock_connect=SECONDS_OF_SILENCE, sock_read=SECONDS_OF_SILENCE
        )
        super().__init__(*arguments, **{"requests_timeout": silence} | settings)

    @retry_request(retries=ATTEMPTS)
    async def _request(self, *arguments: Any, **settings: Any) -> Any:
        global _retried
        try:
            # Below gcsfs' own retries, which tell nobody of themselves.
            return await gcsfs.GCSFileSystem._request.__wrapped__(self, *arguments, **settings)
        except Exception as error:
            _retried += is_retriable(error)
            raise


def _retried_by_tensorstore() -> int:
    if "tensorstore" not in sys.modules:
        return 0
    import tensorstore as ts

    names = ("/tensorstore/kvstore/gcs/retries", "/tensorstore/kvstore/gcs_grpc/retries")
    found = [each for name in names for each in ts.experimental_collect_matching_metrics(name)]
    return sum(value["value"] for each in found for value in each["values"])
