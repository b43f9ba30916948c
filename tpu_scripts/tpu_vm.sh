#!/usr/bin/env bash
# Creates, prepares, uses and deletes a Cloud TPU VM or pod slice. Needs gcloud, logged in.
set -euo pipefail

usage() {
  cat <<'TEXT'
tpu_vm.sh [--dry_run] COMMAND

  create             the TPU VM, as a queued resource
  setup              copies this repository to every worker and installs it there
  train ARGS...      python -m efficientnet_ns.main ARGS on worker 0, in the background
  logs               follows the log of the training
  delete             the TPU VM

Settings (environment): TPU_NAME (needed), ZONE (needed), PROJECT, ACCELERATOR_TYPE (v3-8),
RUNTIME (tpu-vm-tf-2.15.1-pjrt; pod slices take tpu-vm-tf-2.15.1-pod-pjrt), SPOT=1 for a preemptible one.
TensorFlow is a single-client system: on a pod the program runs on worker 0 only, and reaches the others.
A preempted training continues from its last checkpoint with the same `train` command.
TEXT
}

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
command=${1:-help}
shift || true
if [[ $command == help || $command == --help ]]; then
  usage
  exit
fi
: "${TPU_NAME:?set TPU_NAME, the name of the TPU VM}" "${ZONE:?set ZONE, e.g. us-central2-b}"
accelerator_type=${ACCELERATOR_TYPE:-v3-8}
runtime=${RUNTIME:-tpu-vm-tf-2.15.1-pjrt}
where=(--zone="$ZONE")
if [[ -n ${PROJECT:-} ]]; then where+=(--project="$PROJECT"); fi
log='~/efficientnet_ns.log'

run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_workers() { # which workers, then the command line
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

case $command in
  create)
    spot=()
    if [[ -n ${SPOT:-} ]]; then spot=(--spot); fi
    run gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" --node-id="$TPU_NAME" \
      --accelerator-type="$accelerator_type" --runtime-version="$runtime" "${spot[@]}"
    ;;
  setup)
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME":efficientnet_ns.tar.gz "${where[@]}" --worker=all
    # The image's own TensorFlow drives the TPU: everything of requirements.txt but tensorflow itself.
    on_workers all 'mkdir -p efficientnet_ns && tar -xzf efficientnet_ns.tar.gz -C efficientnet_ns &&
      cd efficientnet_ns && grep -v "^tensorflow==" requirements.txt > others.txt && pip install -r others.txt'
    ;;
  train)
    printf -v arguments '%q ' "$@"
    on_workers 0 "cd efficientnet_ns && TPU_NAME=$TPU_NAME nohup python3 -m efficientnet_ns.main $arguments >> $log 2>&1 & disown"
    ;;
  logs) on_workers 0 "tail -F $log" ;;
  delete)
    run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force
    ;;
  *)
    echo "unknown command: $command" >&2
    usage >&2
    exit 2
    ;;
esac
