"""What a step takes from malloc and gives back stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch import allocation, devices

STEPS = """
import os, resource, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one thread: those of a pool also take blocks of one another
{before}
import jax, jax.numpy as jnp
x, w = jnp.ones((4096, 64)), jnp.ones((64, 4096))
@jax.jit
def step(x):
    return jnp.sin(x @ w) @ w.T  # 64 MiB that are free again at the end, more than glibc ever keeps by itself
for _ in range(5):  # until each thread has had its blocks
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from launch import allocation; allocation.keep_freed_memory()"


def faults(before: str, **environment: str) -> int:
    """Pages that 5 steps touched for the first time, in a process of its own."""
    told = subprocess.run(
        [sys.executable, "-c", STEPS.format(before=before)],
        env=devices.cpu_environment({}, devices=1) | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_steps_touch_few_new_pages():
    assert faults("") > 5 * 1_000
    assert faults(KEEP) < 5 * 100


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_what_the_user_has_set_stays():
    assert faults(KEEP, MALLOC_TRIM_THRESHOLD_="131072") > 5 * 1_000


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    def never(_: object) -> None:
        raise AssertionError("loaded a C library")

    monkeypatch.setattr(allocation.ctypes, "CDLL", never)
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("musl", "1.2"))
    allocation.keep_freed_memory()
