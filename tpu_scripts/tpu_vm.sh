#!/usr/bin/env bash
# Creates, prepares, uses and deletes a Cloud TPU VM or a slice of a pod. Requires a logged-in gcloud and a git clone.
#
#   tpu_vm.sh [--dry_run] COMMAND
#
#   create             requests the TPU VM, as a queued resource
#   state              prints the state of that request: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED (preempted) …
#   setup              copies the committed files of this repository to every worker and installs them there
#   run PROGRAM…       runs a program on every worker, in the repository, and waits for it
#   start PROGRAM…     starts a program on worker 0 (see WORKERS), in the background
#   train FLAGS…       starts python3 -m efficientnet_ns.main FLAGS…
#   status             prints the status of the started program: running, its exit code, or new (not started)
#   logs               follows its output
#   stop               makes it save and exit
#   watch PROGRAM…     keeps it running: creates what is missing or was preempted, sets it up, starts the program, and
#                      restarts it after every preemption, until it has finished. It can be restarted at any time.
#   delete             deletes the TPU VM and the request for it
#
# TensorFlow is a single-client system: on a pod, the program runs only on worker 0 and uses the chips of all workers.
# Therefore, use `run` for installing and inspecting, and `start`, `train` and `watch` for training. (Machines with GPUs work the
# other way: run the same program on each, with TF_CONFIG.) With gs:// folders, preempted training continues from
# its last checkpoint, even on another machine. For labeling, each machine of a slice takes its own shards instead:
# WORKERS=all SHARD_ID=auto tpu_vm.sh watch tpu_scripts/imagenet/predict.sh
#
# Settings (environment): TPU_NAME and ZONE (required), PROJECT, ACCELERATOR_TYPE (v3-8), SPOT=1 for a preemptible one,
# WORKERS=all to start programs on every machine, each with its own chips only,
# STACK (reference; current is TensorFlow 2.20 on Python 3.12, not for training on a slice), TF_VERSION (2.15.1), DEVICE_API
# (pjrt; se is the older one of v2 to v4), RUNTIME (the image; default: by these two, the pod variant for training on a slice;
# for the current stack, by the accelerator), POLL_SECONDS (60) between two checks of watch.
# Started programs get the settings of the scripts in imagenet/ and svhn/ (MODEL, LABEL_DATA_DIR, MODEL_DIR,
# EXTRA_FLAGS …; see their --help), and HARDWARE: tpu or tpu_pod.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

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
device_api=${DEVICE_API:-pjrt}
where=(--zone="$ZONE")
if [[ -n ${PROJECT:-} ]]; then where+=(--project="$PROJECT"); fi

workers=${WORKERS:-0}
stack=${STACK:-reference}

# Types with all chips on one machine; all others are slices, whose runtime is the pod variant. It runs a TensorFlow
# server on the other machines, which holds their chips, so it cannot be used if each runs its own program.
case $accelerator_type in
  v2-8 | v3-8 | v4-8 | v5p-8 | v5litepod-[148] | v6e-[148]) slice= ;;
  *) slice=1 ;;
esac
pod=
if [[ -n $slice && $workers != all ]]; then pod=-pod; fi

# Images without a framework. Their Python is 3.10; tpu_install.sh adds another.
base_image() {
  case $accelerator_type in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

case $stack in
  reference) runtime=${RUNTIME:-tpu-vm-tf-${TF_VERSION:-2.15.1}$pod-$device_api} ;;
  current)
    runtime=${RUNTIME:-$(base_image)}
    if [[ -n $pod ]]; then
      echo "STACK=current: no image has the TensorFlow 2.20 server that the machines of a $accelerator_type need to" \
        "train together. Use STACK=reference, an accelerator on one machine, or WORKERS=all." >&2
      exit 2
    fi
    ;;
  *) echo "STACK=$stack: must be one of reference and current" >&2 && exit 2 ;;
esac

on_workers() { # the workers, then the command line
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

create() {
  local spot=()
  if [[ -n ${SPOT:-} ]]; then spot=(--spot); fi
  run gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" --node-id="$TPU_NAME" \
    --accelerator-type="$accelerator_type" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"}
}

state() {
  run gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" --format='value(state.state)'
}

delete() {
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
}

# `setup` copies the committed files of a clone; checked before anything is created.
in_clone() {
  if ! git cat-file -e HEAD:./tpu_scripts/tpu_install.sh 2>/dev/null; then
    echo "tpu_vm.sh: $PWD is not a git clone of this package: use the script of a clone, whose committed files it" \
      "copies to the machines" >&2
    exit 2
  fi
}

setup() {
  local archive
  archive=$(mktemp -d)/efficientnet_ns.tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME":efficientnet_ns.tar.gz "${where[@]}" --worker=all
  rm -rf "$(dirname "$archive")"
  on_workers all 'mkdir -p efficientnet_ns && tar -xzf efficientnet_ns.tar.gz -C efficientnet_ns &&
    STACK='"$stack"' efficientnet_ns/tpu_scripts/tpu_install.sh'
}

# Prints the scripts' settings that are set here, as words for `env` on the worker. HARDWARE is this TPU, regardless of the
# scripts' default.
script_settings() {
  local name HARDWARE=${HARDWARE:-${pod:+tpu_pod}}
  HARDWARE=${HARDWARE:-tpu}
  for name in HARDWARE MODEL TEACHER_MODEL DATA_DIR RAW_DATA_DIR UNLABELED_RAW_DIR LABEL_DATA_DIR UNLABEL_DATA_DIR \
    FILTERED_DATA_DIR PREDICT_DIR TEACHER_CKPT FETCH_TEACHER MODEL_DIR NUM_SHARDS SHARD_ID EXTRA_FLAGS FILTER_FLAGS; do
    if [[ -n ${!name:-} ]]; then printf '%q ' "$name=${!name}"; fi
  done
}

# The files of one program on a worker, in its home folder: efficientnet_ns.log, .pid, .exit (running, or its code).
# shellcheck disable=SC2016 # expands on the worker
is_running='[ "$(cat ~/efficientnet_ns.exit 2> /dev/null)" = running ] && kill -0 "$(cat ~/efficientnet_ns.pid)" 2> /dev/null'

start() {
  local program environment="TPU_NAME=$TPU_NAME"
  # The older interface finds the other workers only if the library is not loaded at import.
  if [[ $device_api == se && -n $pod ]]; then environment+=" TPU_LOAD_LIBRARY=0"; fi
  # A machine of a slice has four chips. These variables limit it to them; otherwise, it waits for the other machines.
  if [[ -n $slice && $workers == all ]]; then
    environment+=" TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 CLOUD_TPU_TASK_ID=0"
  fi
  printf -v program '%q ' "$@"
  # SIGTERM to the group reaches the program; the shell around it survives to record the exit code.
  program="trap : TERM; PATH=\$PWD/.venv/bin:\$PATH
    env $environment $(script_settings)$program; echo \$? > ~/efficientnet_ns.exit"
  # With several programs, one may be restarted while the others run.
  on_workers "$workers" "if $is_running; then
      if [ $workers = all ]; then exit 0; fi
      echo 'a program is running: stop it first' >&2; exit 1
    fi
    cd efficientnet_ns && echo running > ~/efficientnet_ns.exit &&
    { setsid nohup bash -c $(printf '%q' "$program") >> ~/efficientnet_ns.log 2>&1 < /dev/null &
      echo \$! > ~/efficientnet_ns.pid; }"
}

# After a restart of its machine, a program is recorded as running but does not exist: treated as preempted (exit code 75).
status() {
  on_workers "$workers" "status=\$(cat ~/efficientnet_ns.exit 2> /dev/null || echo new)
    if [ \$status = running ] && ! { $is_running; }; then status=75; fi
    echo \$status"
}

# Reduces the states of all workers to the most urgent: a failure is reported, a missing program started, and all must have ended.
most_urgent() {
  local found one
  found=$(cat)
  for one in $(grep -xE '[0-9]+' <<<"$found" | grep -vxE '0|75') new 75 running 0; do
    if grep -qx -- "$one" <<<"$found"; then echo "$one" && return; fi
  done
}

say() {
  echo "$(date +%T) $TPU_NAME: $*" >&2
}

# Checks the state once, and acts on it.
watch_once() {
  local now
  now=$(state 2>/dev/null || echo MISSING)
  case $now in
    ACTIVE) now=$(status 2>/dev/null | most_urgent || true) ;;
    SUSPENDED | FAILED)
      say "$now: deleting it and requesting another"
      delete
      now=MISSING
      ;;
  esac
  case $now in
    MISSING) say "creating it" && create ;;
    new) say "setting it up" && setup && say "starting" && start "$@" ;;
    75) say "the program was interrupted: restarting it" && start "$@" ;;
    0) say "the program has finished; to delete the TPU VM, run tpu_vm.sh delete" && exit 0 ;;
    [1-9] | [1-9][0-9] | [1-9][0-9][0-9])
      say "the program failed with exit code $now: see tpu_vm.sh logs"
      exit "$now"
      ;;
    *) say "${now:-not reachable}" ;;
  esac
}

case $command in
  setup | watch) in_clone ;;
esac
case $command in
  create | state | delete | setup | status) "$command" ;;
  run)
    printf -v program '%q ' "$@"
    on_workers all "cd efficientnet_ns && PATH=\$PWD/.venv/bin:\$PATH && $program"
    ;;
  start) start "$@" ;;
  train) start python3 -m efficientnet_ns.main "$@" ;;
  logs) on_workers 0 'tail -n 100 -F ~/efficientnet_ns.log' ;;
  stop)
    # shellcheck disable=SC2016 # expands on the worker
    on_workers "$workers" 'kill -TERM -- "-$(cat ~/efficientnet_ns.pid)"'
    ;;
  watch)
    if [[ -n $dry_run ]]; then # The commands after a preemption.
      state && delete && create && setup && start "$@" && status
      exit
    fi
    while true; do
      watch_once "$@" || say "that failed; retrying"
      sleep "${POLL_SECONDS:-60}"
    done
    ;;
  *)
    echo "unknown command: $command" >&2
    usage >&2
    exit 2
    ;;
esac
