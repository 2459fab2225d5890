"""gcloud and kubectl that write down how they were called, and a machine on which gcloud's ssh runs."""

from __future__ import annotations

import json
import os
import pathlib
import stat
import sys
from typing import Any

# What every fake begins with: it writes down its name and arguments, and fails as often as the test wants.
HEAD = f"""#!{sys.executable} -ES
import json, os, pathlib, subprocess, sys
home = pathlib.Path(os.environ["FAKE_HOME"])
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
call = {{"program": name, "arguments": arguments}}
def note():
    with open(home / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")
def fail(*keys):
    plan = json.loads((home / "failures.json").read_text())
    for key in keys:
        if plan.get(key, 0) > 0:
            plan[key] -= 1
            (home / "failures.json").write_text(json.dumps(plan))
            sys.exit(255)
def answer(file):
    '''The next line of a file; its last one for ever.'''
    lines = (home / file).read_text().splitlines()
    (home / file).write_text("\\n".join(lines[1:] or lines))
    print(lines[0] if lines else "")
"""

GCLOUD = """
note()
verb = arguments[3]
fail(verb)
if verb == "describe":
    answer("states")
if verb == "ssh":
    flags = dict(argument.split("=", 1) for argument in arguments[5:])
    hosts = json.loads((home / "hosts.json").read_text())
    if flags["--worker"] != "all":
        hosts = hosts[: 1]
    for host in hosts:  # as sshd does: one string, read by the user's shell
        subprocess.run(["bash", "-c", flags["--command"]], env={**os.environ, "FAKE_HOST": host})
"""

KUBECTL = """
verb = arguments[2]
if verb == "create":
    call["stdin"] = sys.stdin.read()
note()
fail(verb)
if verb == "get" and "jsonpath" in arguments[-1]:
    answer("states")
if verb == "get" and "Failed" in " ".join(arguments):
    answer("failed")
"""

# On the hosts nothing but the shell, since it is called often: a record a call, `docker wait` prints the next code.
DOCKER = r"""#!/bin/bash
printf '%s\x1f' "$FAKE_HOST" "$@" >>"$FAKE_HOME/docker"
printf '\x1e' >>"$FAKE_HOME/docker"
codes=$FAKE_HOME/codes-$FAKE_HOST
if [[ $1 == logs ]]; then
  echo "training begins"
  echo "step 1" >&2
fi
if [[ $1 == wait && -e $codes ]]; then
  mapfile -t left <"$codes"
  echo "${left[0]}"
  ((${#left[@]} == 1)) || printf '%s\n' "${left[@]:1}" >"$codes"
fi
"""

SUDO = """#!/bin/bash
exec "$@"
"""

# The metadata server; here the last number of a host's name is that of its slice.
CURL = """#!/bin/bash
[[ ${*: -1} == http://metadata.google.internal/computeMetadata/v1/instance/attributes/tpu-env ]] || exit 6
printf "%s\\n" "ACCELERATOR_TYPE: 'v5litepod-256'" "MEGASCALE_NUM_SLICES: '4'" "MEGASCALE_SLICE_ID: '${FAKE_HOST##*-}'" "ZONE: 'a'"
"""

HOSTNAME = """#!/bin/bash
echo "$FAKE_HOST"
"""


class Cloud:
    """Programs in a folder that is first on the PATH."""

    def __init__(self, home: pathlib.Path, *, hosts: list[str]):
        self.home = home
        self.hosts = hosts
        programs = {
            "gcloud": HEAD + GCLOUD,
            "kubectl": HEAD + KUBECTL,
            "docker": DOCKER,
            "sudo": SUDO,
            "hostname": HOSTNAME,
            "curl": CURL,
        }
        for name, body in programs.items():
            path = home / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(body)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (home / "hosts.json").write_text(json.dumps(hosts))
        self.plan()

    @property
    def environment(self) -> dict[str, str]:
        """What finds them."""
        return {
            "PATH": f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "FAKE_HOME": str(self.home),
        }

    def plan(
        self,
        *,
        states: list[str] | None = None,
        failed: str = "",
        failures: dict[str, int] | None = None,
        codes: dict[str, list[int]] | None = None,
    ) -> None:
        """What will happen: states of the queue or the JobSet, how often each verb fails, exit codes of each host in turn."""
        (self.home / "states").write_text("\n".join(states or ["ACTIVE"]))
        (self.home / "failed").write_text(failed)
        (self.home / "failures.json").write_text(json.dumps(failures or {}))
        for host in self.hosts:
            each = (codes or {}).get(host, [0])
            (self.home / f"codes-{host}").write_text("\n".join(map(str, each)))

    def forget(self, host: str) -> None:
        """A host that has lost its container."""
        (self.home / f"codes-{host}").unlink()

    def calls(self, program: str) -> list[dict[str, Any]]:
        """How gcloud or kubectl was called so far."""
        path = self.home / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["program"] == program]

    def docker_calls(self) -> list[tuple[str, list[str]]]:
        """The host and the arguments of each call of docker so far."""
        records = (self.home / "docker").read_bytes().decode().split("\x1e")[:-1]
        calls = [record.split("\x1f")[:-1] for record in records]
        return [(host, arguments) for host, *arguments in calls]
