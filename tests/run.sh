#!/usr/bin/env bash
# Runs the tests from a bare clone: environment, real checkpoints (once), then pytest. Its exit code is pytest's.
#
#   ./tests/run.sh [--lint] [--slow] [pytest's arguments]
#
#   --lint  first ruff check and ruff format --check
#   --slow  all tests: those marked slow too, and those that compare with other programs (installs `peers` and `tpu`); T5X is not
#           installed, so those marked t5x skip, saying so, where it isn't there already
#
# MERGING_TEST_WORKERS      processes that share the tests, file by file; default 2; 0 runs them in this one (for --pdb)
# MERGING_VENV              where the environment lies; default .venv
# MERGING_REAL_DATA         folder of real inputs; default ../shared/real; empty or absent: tests of them skip
# MERGING_REAL_CHECKPOINTS  where the real checkpoints are kept that its make_checkpoints.py makes (0.8 GB)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

extras=(test)
selected=(-m "not slow")
lint=
while [[ ${1:-} == --lint || ${1:-} == --slow ]]; do
  case $1 in
  --lint) lint=1 ;;
  --slow)
    extras=(test peers tpu)
    selected=()
    ;;
  esac
  shift
done

merging_environment "${extras[@]}"
cd "$merging_root"

if [[ -n $lint ]]; then
  "$python" -m ruff check .
  "$python" -m ruff format --check .
fi

# Real checkpoints, made beside their place and renamed: a run that is killed leaves nothing half done there.
export MERGING_REAL_DATA=${MERGING_REAL_DATA-$merging_root/../shared/real}
export MERGING_REAL_CHECKPOINTS=${MERGING_REAL_CHECKPOINTS:-${XDG_CACHE_HOME:-$HOME/.cache}/merging-at-scale/real}
maker=$MERGING_REAL_DATA/make_checkpoints.py
if [[ -d $MERGING_REAL_CHECKPOINTS ]]; then
  :
elif [[ -n $MERGING_REAL_DATA && -f $maker ]]; then
  echo "Making real checkpoints in $MERGING_REAL_CHECKPOINTS (once)" >&2
  mkdir -p "$(dirname "$MERGING_REAL_CHECKPOINTS")"
  making=$(mktemp -d "$MERGING_REAL_CHECKPOINTS.making.XXXXXX")
  trap 'rm -rf "$making"' EXIT
  if ! "$python" "$maker" "$making"; then
    echo "They can't be made. MERGING_REAL_DATA= (empty) runs the tests without them." >&2
    exit 1
  fi
  chmod 755 "$making"
  "$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$making" "$MERGING_REAL_CHECKPOINTS" ||
    [[ -d $MERGING_REAL_CHECKPOINTS ]] # another run may have been first
else
  echo "No real data (MERGING_REAL_DATA): tests of real checkpoints will skip." >&2
fi

# Files in the order of their names: those with the fewest tests, which come last otherwise, are among the longest.
"$python" -m pytest --numprocesses="${MERGING_TEST_WORKERS:-2}" --dist=loadfile --no-loadscope-reorder \
  ${selected[@]+"${selected[@]}"} "$@"
