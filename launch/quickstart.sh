#!/usr/bin/env bash
# From a bare clone to the report of a study: makes the virtual environment, then bases, experts, merges and their scores by
# gin_configs/studies/quick.gin in ./quickstart, shared by a worker a core. Ended by anything, it goes on; flags are those of launch.study.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

merging_environment
cd "$merging_root"
study=("$python" -m launch.study --study=quick --output=quickstart "$@")
for flag in "$@"; do
  case $flag in
    --dry_run | --status | --plan | --help*) exec "${study[@]}" ;; # they tell, and make nothing
  esac
done
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 8 ? cores : 8)) # each takes 1.5 GiB of memory, and a phase has 18 items at most to share
exec "$python" -m launch.pod.local --workers="$workers" -- "${study[@]}"
