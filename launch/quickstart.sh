#!/usr/bin/env bash
# From a bare clone to a first merge: makes the virtual environment, then small checkpoints, and merges them by every
# method into ./quickstart. Run it again as often as you like.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

merging_environment
cd "$merging_root"
exec "$python" -m launch.quickstart "$@"
