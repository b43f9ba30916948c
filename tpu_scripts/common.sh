# Functions shared by the scripts in this folder. Sourced by them, not run.
#
# Every script accepts --dry_run (prints its commands without running them), --help, and further flags, which are passed
# to the program that it starts. Its settings are environment variables, listed by --help; these work everywhere:
#   PYTHON       the interpreter (default: python, otherwise python3)
#   HARDWARE     a file of flags/hardware: cpu, gpu, tpu, or tpu_pod, which needs TPU_NAME
#   EXTRA_FLAGS  more flags for efficientnet_ns.main, separated by spaces
# Paths may be gs://…; relative ones are relative to the repository, where all commands run.
# shellcheck shell=bash

set -euo pipefail
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$(command -v python >/dev/null && echo python || echo python3)
fi
dry_run=
arguments=()

# Reads --dry_run and --help; stores the other words in `arguments`.
parse_arguments() {
  local word
  for word in "$@"; do
    case $word in
      --dry_run) dry_run=1 ;;
      --help) usage && exit ;;
      *) arguments+=("$word") ;;
    esac
  done
}

# Prints the comment at the top of the script.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$script"
}

# Runs a command, or only prints it.
run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Runs efficientnet_ns.main with the given flags, then those of the hardware and of the user.
main() {
  local device=("--flagfile=flags/hardware/$HARDWARE.flags") extra
  if [[ $HARDWARE == tpu_pod ]]; then
    device+=("--tpu=${TPU_NAME:?set TPU_NAME, the name of the TPU VM}")
  fi
  read -r -a extra <<<"${EXTRA_FLAGS:-}"
  run "$PYTHON" -m efficientnet_ns.main "$@" "${device[@]}" \
    ${extra[@]+"${extra[@]}"} ${arguments[@]+"${arguments[@]}"}
}

# Runs other scripts of the same folder in turn; each argument holds a script and its words.
run_scripts() {
  local folder line words
  folder=$(dirname "$script")
  for line in "$@"; do
    read -r -a words <<<"$line"
    "$folder/${words[0]}" "${words[@]:1}" ${dry_run:+--dry_run} ${arguments[@]+"${arguments[@]}"}
  done
}

# Filters and balances with the given preset, then FILTER_FLAGS and the script's words. As in the original's scripts, a
# first word of 1 stops after the statistics; 0 does not.
filter() {
  local extra
  read -r -a extra <<<"${FILTER_FLAGS:-}"
  case ${arguments[0]:-} in
    0 | 1) arguments[0]=--only_get_stats=${arguments[0]} ;;
  esac
  run "$PYTHON" -m efficientnet_ns.filter_unlabel --flagfile="$1" \
    --unlabel_data_dir="$UNLABEL_DATA_DIR" \
    --info_dir="$PREDICT_DIR/info" \
    --prediction_dir="$PREDICT_DIR/predict_label" \
    --prelim_stats_dir="$PREDICT_DIR/prelim_stats" \
    --output_dir="$PREDICT_DIR/filter_data" \
    --num_shards="$NUM_SHARDS" \
    ${extra[@]+"${extra[@]}"} ${arguments[@]+"${arguments[@]}"}
}
