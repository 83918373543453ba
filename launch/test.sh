#!/usr/bin/env bash
# Lints and tests. `launch/test.sh` needs nothing but Python; `--parity` also installs PyTorch (CPU), bitsandbytes
# and PEFT and compares with them, and compiles for TPUs with their compiler. Other arguments go to pytest:
# `launch/test.sh tests/cli_test.py -k help`.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

torch_version=2.13.0
libtpu_version=0.0.42
# PEFT imports the last two.
peers=(bitsandbytes==0.50.2 peft==0.21.2 accelerate==1.15.0 psutil==7.2.2)

# A CPU build of PyTorch is 20 times smaller than the default one of Linux, but lives on an index of its own. The first
# try costs a second and finds it wherever pip is already set up to; the last takes whatever the usual index has.
install_torch() {
  local pip=(python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20)
  if python -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
    return
  fi
  printf 'installing PyTorch %s for the parity tests\n' "$torch_version"
  "${pip[@]}" "torch==$torch_version+cpu" 2>/dev/null ||
    "${pip[@]}" "torch==$torch_version" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
    "${pip[@]}" "torch==$torch_version" ||
    fail "PyTorch $torch_version could not be installed; run without --parity, or install it yourself."
}

# Without their dependencies: the one that matters is PyTorch, and that is there; the others are listed here.
install_peers() {
  local peer missing=()
  for peer in "${peers[@]}"; do
    python -c "import sys; from importlib.metadata import version; \
      sys.exit(version('${peer%==*}') != '${peer#*==}')" 2>/dev/null || missing+=("$peer")
  done
  if [[ ${#missing[@]} -eq 0 ]]; then
    return
  fi
  printf 'installing %s for the parity tests\n' "${missing[*]}"
  python -m pip install --quiet --disable-pip-version-check --no-deps "${missing[@]}" ||
    fail "${missing[*]} could not be installed; run without --parity, or install them yourself."
}

# Beside the packages and not among them: where Python finds libtpu, JAX looks for a TPU whenever it starts.
install_libtpu() {
  local folder="$VIRTUAL_ENV/libtpu-$libtpu_version"
  if [[ ! -f "$folder/libtpu/libtpu.so" ]]; then
    printf 'installing libtpu %s (210 MB) for the parity tests\n' "$libtpu_version"
    python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder" \
      "libtpu==$libtpu_version" || fail "libtpu $libtpu_version could not be installed; run without --parity."
  fi
  export TPU_LIBRARY_PATH="$folder/libtpu/libtpu.so"
}

parity=false
arguments=()
for argument in "$@"; do
  if [[ "$argument" == --parity ]]; then
    parity=true
  else
    arguments+=("$argument")
  fi
done

enter_environment
cd "$repository"
# Several processes of pytest would find nothing and say nothing.
for argument in ${arguments[@]+"${arguments[@]}"}; do
  if [[ "$argument" == *.py* && "$argument" != -* && ! -e "${argument%%::*}" ]]; then
    fail "there is no test file ${argument%%::*}."
  fi
done

printf '== ruff\n'
python -m ruff check .
python -m ruff format --check .

printf '== tests\n'
# Most of the time goes into compiling, one core each: a process for each core, one file at a time, halves it on two.
pytest=(python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadscope)
if [[ "$parity" == true ]]; then
  install_torch
  install_peers
  install_libtpu
else
  pytest+=(--ignore=tests/parity)
fi
"${pytest[@]}" ${arguments[@]+"${arguments[@]}"}
