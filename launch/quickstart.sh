#!/usr/bin/env bash
# From nothing to a trained, measured, exported and answering model, on 2 CPU cores.
#
#   launch/quickstart.sh             the real thing: some minutes of training
#   launch/quickstart.sh --compare   also trains with SFT in place of PO, and puts its numbers beside
#   launch/quickstart.sh --smoke     every stage in seconds: shows that all parts work, learns nothing
#
# Everything lands in runs/quickstart (or the folder given as last argument). Called again, it goes on where it was.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

smoke=false
compare=false
folder=""
for argument in "$@"; do
  case "$argument" in
    --smoke) smoke=true ;;
    --compare) compare=true ;;
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*) fail "there is no flag $argument. Use --smoke, --compare or a folder." ;;
    *) folder="$(mkdir -p "$argument" && cd "$argument" && pwd)" ;;
  esac
done

stages=7
number=0
began=$SECONDS

# stage NAME COMMAND...: runs a command under a heading, and says how long it took.
stage() {
  local name="$1" start=$SECONDS
  shift
  number=$((number + 1))
  printf '\n[%d/%d] %s\n' "$number" "$stages" "$name"
  "$@"
  printf '[%d/%d] done in %d s\n' "$number" "$stages" "$((SECONDS - start))"
}

train() {
  local data=(--config.data.name="$source" --config.data.data_dir="$folder/data")
  phantom-jax train --config="configs/quickstart.py:objective=po$variant" "${data[@]}" --workdir="$folder"
  if [[ "$compare" == true ]]; then
    printf '\nthe same again with SFT in place of PO\n'
    phantom-jax train --config="configs/quickstart.py:objective=sft$variant" "${data[@]}" --workdir="$folder/sft"
  fi
}

# The names of the config's phases, in order.
phases() {
  python -c 'import json, sys; print(*(phase["name"] for phase in json.load(open(sys.argv[1]))["phases"]), sep="\n")' \
    "$folder/config.json"
}

evaluate() {
  local models=() name before="" last=""
  # Every phase leaves its model in models/, but the last: that one is the run's, in model/.
  while read -r name; do
    if [[ -n "$last" ]]; then
      models+=(--model="$folder/models/$last")
    fi
    before="$last"
    last="$name"
  done < <(phases)
  if [[ "$compare" == true ]]; then
    models+=(--model="sft:$before=$folder/sft/models/$before" --model="sft:$last=$folder/sft/model")
  fi
  phantom-jax evaluate "${models[@]}" --model="$last=$folder/model" --source="$source" --data_dir="$folder/data" \
    --split=test --output="$folder/evaluation"
}

convert() {
  # Written anew each time; what else may be called hf in a folder of the user's stays.
  if [[ -e "$folder/hf" && ! -f "$folder/hf/phantom_jax_processor.json" ]]; then
    fail "$folder/hf exists and is no exported model; move it away, or give another folder."
  fi
  rm -rf "$folder/hf"
  phantom-jax convert --source="$folder/model" --target="$folder/hf" --to=phantom --verify \
    --evaluation="$(phases | tail -n 1)=$folder/evaluation"
}

# Asks the exported model one of the questions that the evaluation kept, and expects the answer it gave before.
ask() {
  local image question truth before answer
  {
    read -r image
    read -r question
    read -r truth
    read -r before
  } < <(python - "$folder/evaluation/results.json" <<'PYTHON'
import json
import sys

results = json.load(open(sys.argv[1]))
reading = [example for example in results["examples"] if len(example["truth"]) > 2 and example["truth"].isdigit()]
example = (reading or results["examples"])[0]
answer = list(example["answers"].values())[-1].replace("\n", " ")
print(example["image"], example["question"], example["truth"], answer, sep="\n")
PYTHON
  )
  printf '$ phantom-jax generate --model=%s --image=%s --prompt="%s"\n' \
    "$folder/hf" "$folder/evaluation/$image" "$question"
  answer="$(phantom-jax generate --model="$folder/hf" --image="$folder/evaluation/$image" --prompt="$question")"
  printf '%s\n(the truth: %s)\n' "$answer" "$truth"
  if [[ "$(tr '\n' ' ' <<<"$answer" | sed 's/^ *//; s/ *$//')" != "$before" ]]; then
    fail "the exported model answers '$answer' where the trained one answered '$before'."
  fi
}

if [[ "$smoke" == true ]]; then
  if [[ -z "$folder" ]]; then
    folder="$repository/runs/smoke"
    rm -rf "$folder"
  fi
  source=handwritten_numbers/tiny
  variant=",smoke"
else
  folder="${folder:-$repository/runs/quickstart}"
  source=handwritten_numbers
  variant=""
fi

cd "$repository"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
mkdir -p "$folder"

stage "set up the environment" enter_environment
stage "prepare the records: handwritten numbers, their questions, a tokenizer" \
  phantom-jax prepare --source="$source" --target="$folder/data"
stage "train: pre-training, Phantom step 1 (PO), Phantom step 2 (SFT)" train
stage "evaluate on the test split, after each phase" evaluate
stage "export to Hugging Face format and read it back" convert
stage "ask the exported model about a test image" ask
stage "draw the report" \
  phantom-jax report --workdir="$folder" --evaluation="$folder/evaluation" --output="$folder/report.png"

printf '\nall done in %d s; see %s\n' "$((SECONDS - began))" "$folder/report.png"
