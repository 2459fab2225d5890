# Sourced by launch/quickstart.sh and tests/run.sh: the virtual environment, made once and kept up to date.
#
#   merging_environment [EXTRA...]   makes or reuses the environment with those extras of setup.py; sets $python
#
# It lies in .venv of the repository, or where MERGING_VENV says. A stamp for the project and one for each extra holds
# a hash of setup.py and of the place of the repository, so that pip runs only when either has changed.

unset PYTHONDONTWRITEBYTECODE # imports take twice as long without .pyc files

merging_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

merging_environment() {
  local place=${MERGING_VENV:-$merging_root/.venv} made_with stamp extra is_stale=
  python=$place/bin/python
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    made_with=$(merging_python)
    echo "Making a virtual environment in $place" >&2
    "$made_with" -m venv "$place"
  fi
  stamp=$({
    echo "$merging_root"
    cat "$merging_root/setup.py"
  } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  for extra in project "$@"; do
    [[ $(cat "$place/.merging-$extra" 2>/dev/null) == "$stamp" ]] || is_stale=1
  done
  [[ -n $is_stale ]] || return 0
  local extras
  extras=$(IFS=,; echo "$*")
  echo "Installing merging-at-scale${extras:+[$extras]} into $place (minutes the first time)" >&2
  # Compiled to .pyc when first imported: a third of the time, for files of which most never are.
  "$python" -m pip install --quiet --no-compile -e "$merging_root${extras:+[$extras]}"
  for extra in project "$@"; do
    echo "$stamp" >"$place/.merging-$extra"
  done
}

# The first Python of at least 3.11 on the path.
merging_python() {
  local candidate
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed, and none is on the path." >&2
  return 1
}
