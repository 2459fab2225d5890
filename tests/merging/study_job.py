"""One of two workers that make the same bases: the first says when it trains and waits for a line, the second passes them over."""

from __future__ import annotations

import sys

import jax

from merging import study
from tests.merging.test_study import DATA, settings, training


def should_stop(step: int) -> bool:
    if sys.argv[2] == "first" and step == 1:
        print("training", flush=True)
        sys.stdin.readline()
    return False


if __name__ == "__main__":
    study.SECONDS_BETWEEN_LOOKS = 0.05
    planned = study.plan(settings(sys.argv[1], bases={"pretrained": training("text")}), DATA)
    with jax.numpy_dtype_promotion("standard"):
        report = study.run(
            planned,
            phases=["bases"],
            log=lambda text: print(text, flush=True),
            should_stop=should_stop,
        )
    print(report.made["bases"])
