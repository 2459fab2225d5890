#!/usr/bin/env bash
# From a bare clone to the report of a study: makes the virtual environment, then bases, experts, merges and their scores by
# gin_configs/studies/quick.gin in ./quickstart. Ended by anything, it goes on; flags are those of launch.study.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

merging_environment
cd "$merging_root"
exec "$python" -m launch.study --study=quick --output=quickstart "$@"
