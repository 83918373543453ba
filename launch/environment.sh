# shellcheck shell=bash
# Sourced by the scripts beside it: a Python environment with the tested packages.
#
# With a virtual environment active, that one is used; otherwise .venv in the repository, made on the first call.
# After `enter_environment`, `python` and `phantom-jax` are those of the environment.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the first Python of a supported version that can make virtual environments.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
      >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "Python 3.11, 3.12 or 3.13 with its venv module is needed and none was found." \
    "Install one (Debian: apt install python3 python3-venv), or set PYTHON to its path."
}

# Runs a command with its output in a log; shows the end of the log if the command fails.
logged() {
  local log="$1"
  shift
  if ! "$@" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "this command failed (its whole output is in $log): $*"
  fi
}

enter_environment() {
  local home python stamp
  if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    home="$repository/.venv"
    if ! "$home/bin/python" -m pip --version >/dev/null 2>&1; then
      python="$(find_python)" || exit 1
      printf 'making a virtual environment in %s\n' "$home"
      "$python" -m venv "$home"
    fi
    export VIRTUAL_ENV="$home"
    export PATH="$home/bin:$PATH"
  fi
  home="$VIRTUAL_ENV"
  # What was installed, and from where: when neither changed there is nothing to do.
  stamp="$(cat "$repository/requirements.txt" "$repository/pyproject.toml" - <<<"$repository" | cksum)"
  if [[ "$(cat "$home/phantom-jax.stamp" 2>/dev/null || true)" != "$stamp" ]]; then
    printf 'installing the packages of requirements.txt into %s (1.4 GB on disk)\n' "$home"
    : >"$home/phantom-jax.log"
    logged "$home/phantom-jax.log" python -m pip install --disable-pip-version-check \
      --requirement "$repository/requirements.txt" --editable "$repository"
    printf '%s\n' "$stamp" >"$home/phantom-jax.stamp"
  fi
}
