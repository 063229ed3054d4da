#!/usr/bin/env bash
# From images to weights as SLURM jobs, each started after the one before has succeeded: freeze the list of images,
# run the array of workers, finish the data set, pre-train, export.
#
#   BEIT_WORKERS=64 IMAGES=photos TOKENIZER=dvae.safetensors cluster/slurm/pipeline.sh
#   RUN=runs/large RECIPE=configs/beit_large.yaml cluster/slurm/pipeline.sh steps=1000 -- --views 4 --held-out 2%
#   cluster/slurm/pipeline.sh --dry-run                # prints the sbatch lines
#
# key=value overrides go to pre-training; options after `--` go to beit shards. After a failure, start it again once
# none of its jobs is left: steps whose results exist are skipped.
set -euo pipefail

BEIT_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export BEIT_SLURM
if [[ -f $BEIT_SLURM/site.sh ]]; then
  set +eu
  # shellcheck source=/dev/null
  . "$BEIT_SLURM/site.sh"
  set -eu
fi

# Settings; each can be given in the environment. The scripts have more.
export BEIT_WORKERS=${BEIT_WORKERS:-16}
export IMAGES=${IMAGES:-images}
export TOKENIZER=${TOKENIZER:-tokenizer.safetensors}
export DATA=${DATA:-shards}
export RUN=${RUN:-runs/base}
EXPORT=${EXPORT:-$RUN/exported}                        # folder for model.safetensors
read -ra tokenize_options <<<"${TOKENIZE_SBATCH:-}"    # options of sbatch, such as --gpus-per-node=4
read -ra train_options <<<"${PRETRAIN_SBATCH:-}"
read -ra step_options <<<"${STEP_SBATCH:-}"

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=yes
  shift
fi
overrides=()
while (($#)) && [[ $1 != -- ]]; do
  if [[ $1 == -* || $1 != *=* ]]; then
    echo "error: got '$1', expected --dry-run (first), or key=value, or -- before options of beit shards" >&2
    exit 2
  fi
  overrides+=("$1")
  shift
done
(($#)) && shift
options=("$@")
if [[ ! $BEIT_WORKERS =~ ^[1-9][0-9]*$ ]]; then
  echo "error: BEIT_WORKERS: got '$BEIT_WORKERS', expected the number of workers, 1 or more" >&2
  exit 2
fi

if [[ $RUN == *://* ]]; then
  echo "error: RUN: got '$RUN', expected a folder, in which the scripts can look for DONE" >&2
  exit 2
fi

# shellcheck source=/dev/null
. "$BEIT_SLURM/claim.sh"
lock=
if [[ -z $dry ]] && open_claim "$RUN"; then
  refuse_claimed "$RUN" || exit 2
fi
last= # the job that was submitted last
submitted=()

# step NAME RESULT ARGUMENTS OF SBATCH...: submit a step, unless its result exists. If a step runs again, so do the
# steps after it.
step() {
  local name=$1 result=$2
  shift 2
  if [[ -z $last && -e $result ]]; then
    echo "$name: $result is there"
    return
  fi
  local command=(sbatch --parsable --export=ALL)
  [[ -n $last ]] && command+=("--dependency=afterok:$last" --kill-on-invalid-dep=yes)
  command+=(--job-name="beit-$name" "$@")
  if [[ -n $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
    last=${name^^}
    return
  fi
  last=$("${command[@]}")
  last=${last%%;*} # the cluster's name may follow
  submitted+=("$last")
  # At once, so that the jobs submitted so far are on record if the next one is refused.
  [[ -z $lock ]] || printf '%s\n' "${submitted[@]}" >"$RUN/slurm-jobs"
  echo "$name: job $last"
}

# Every step of the offline job gets the same options; those that affect the bytes are compared.
shards=(--images "$IMAGES" --out "$DATA" "${options[@]}")
if [[ -e $DATA/manifest.json ]]; then
  echo "tokenize: $DATA/manifest.json is there"
else
  step freeze "$DATA/sources.jsonl" "${step_options[@]}" "$BEIT_SLURM/beit.sbatch" shards "${shards[@]}" --index-only
  step tokenize "$DATA/manifest.json" --array="0-$((BEIT_WORKERS - 1))" "${tokenize_options[@]}" \
    "$BEIT_SLURM/tokenize.sbatch" "${options[@]}"
  step finish "$DATA/manifest.json" "${step_options[@]}" "$BEIT_SLURM/beit.sbatch" shards "${shards[@]}" --finish
fi
step pretrain "$RUN/DONE" "${train_options[@]}" "$BEIT_SLURM/pretrain.sbatch" "${overrides[@]}"
export BEIT_NEEDS=$RUN/DONE # pre-training that was stopped too often counts as no error
step export "$EXPORT/model.safetensors" "${step_options[@]}" "$BEIT_SLURM/beit.sbatch" export "$RUN" --to safetensors \
  --out "$EXPORT"
