# shellcheck shell=bash
# Who may work in a run folder: RUN/slurm-jobs has the numbers of the jobs to which it belongs.

# claim RUN JOB: take a run folder for a job, unless it belongs to others of which one is queued or runs.
claim() {
  local lock=
  open_claim "$1" || return 0
  if ! grep -qx "$2" "$1/slurm-jobs"; then
    refuse_claimed "$1" || return 1
    echo "$2" >"$1/slurm-jobs"
  fi
  exec {lock}>&-
}

# open_claim RUN: hold the file, in `lock`, so that of two that look at it one is first. Fails where it cannot be made;
# the trainer then finds out why.
open_claim() {
  [[ $1 != *://* ]] || return 1
  { mkdir -p "$1" && exec {lock}>>"$1/slurm-jobs"; } 2>/dev/null || return 1
  # Where a file system has no locks, two could both be first, and the trainer's own numbers of starts decide.
  flock --wait 60 "$lock" 2>/dev/null || true
}

# refuse_claimed RUN: say to which job the folder belongs, if one of them is queued or runs.
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
