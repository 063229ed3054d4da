# shellcheck shell=bash
# Who may work in a run folder: RUN/slurm-jobs holds the numbers of the jobs that own it.

# claim RUN JOB: take a run folder for a job, unless it belongs to other jobs and one of them is queued or running.
claim() {
  local lock=
  open_claim "$1" || return 0
  if ! grep -qx "$2" "$1/slurm-jobs"; then
    refuse_claimed "$1" || return 1
    echo "$2" >"$1/slurm-jobs"
  fi
  exec {lock}>&-
}

# open_claim RUN: lock the file (`lock`), so that two jobs cannot look at it at once. Fails if the file cannot be made;
# the trainer then finds out why.
open_claim() {
  [[ $1 != *://* ]] || return 1
  { mkdir -p "$1" && exec {lock}>>"$1/slurm-jobs"; } 2>/dev/null || return 1
  # On a file system without locks, two jobs can both succeed; then the trainer's own start numbers decide.
  flock --wait 60 "$lock" 2>/dev/null || true
}

# refuse_claimed RUN: fail, and name the job that owns the folder, if one of its jobs is queued or running.
refuse_claimed() {
  local jobs owner
  jobs=$(squeue --noheader --format='%F %j %T') || return 0
  while read -r owner; do
    if owner=$(grep -m 1 "^$owner " <<<"$jobs"); then
      echo "error: RUN: $1 belongs to job ${owner%% *} (${owner#* }). Wait for its end, cancel it (scancel" \
        "${owner%% *}), or choose another folder" >&2
      return 1
    fi
  done <"$1/slurm-jobs"
}
