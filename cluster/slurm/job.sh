# shellcheck shell=bash
# Code that the batch scripts share. They source it after `cd` into the folder that sbatch was called in.
#
# Sets PYTHON, MAX_RESTARTS, PREFLIGHT, JOB (its name for scontrol), RESTART, NODE, MASTER_ADDR, MASTER_PORT and METRICS_PORT.

ulimit -c 0
# Until there is something to stop, only note the first of SLURM's signals.
STOPPED=
trap 'STOPPED=USR1' USR1
trap 'STOPPED=${STOPPED:-TERM}' TERM
# shellcheck source=/dev/null
. "$BEIT_SLURM/claim.sh" || return 1

# The environment of sbatch first, then the site's file, then the defaults.
if [[ -f $BEIT_SLURM/site.sh ]]; then
  set +u # modules and conda use variables that are not set
  # shellcheck source=/dev/null
  . "$BEIT_SLURM/site.sh"
  set -u
fi
PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-200}
PREFLIGHT=${PREFLIGHT:-yes}

# SLURM sets many of its variables only if the matching option was given.
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "error: SLURM_JOB_ID is not set: start this script with sbatch" >&2
  exit 2
fi
if [[ ! $PREFLIGHT =~ ^(yes|no)$ ]]; then
  echo "error: PREFLIGHT: got '$PREFLIGHT', expected yes or no" >&2
  exit 2
fi
if [[ ! $MAX_RESTARTS =~ ^[0-9]+$ ]]; then
  echo "error: MAX_RESTARTS: got '$MAX_RESTARTS', expected a whole number" >&2
  exit 2
fi
# The last task of an array has the array's own number, which scontrol takes for all tasks.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-$SLURM_JOB_ID}
RESTART=${SLURM_RESTART_COUNT:-0}
if ((RESTART > MAX_RESTARTS)); then # SLURM has requeued it by itself, for example after a node was lost
  echo "error: not started, after $RESTART restarts (MAX_RESTARTS=$MAX_RESTARTS)" >&2
  exit 1
fi
NODE=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
NODE=${NODE:-$(hostname)} # the script runs on the first node
export MASTER_ADDR=${MASTER_ADDR:-$NODE}
# Twenty ports per job: neighbouring jobs, and the restarts of one job, never share a port. All are below 32768,
# where the ports begin that Linux uses for outgoing connections. Each task of an array is a job with a number of its own.
export MASTER_PORT=$((10000 + (SLURM_JOB_ID % 1000) * 20 + RESTART % 10))
METRICS_PORT=$((MASTER_PORT / 20 * 20 + 10)) # one of the same twenty, which no restart uses

# announce train|tokenize FOLDER HOST: tell Prometheus where the metrics are for as long as this script runs.
announce() {
  [[ -n ${BEIT_TARGETS:-} ]] || return 0
  local folder=$BEIT_TARGETS name=${2%/} jobs other
  name=${name##*/}
  [[ -d $folder/$1 ]] && folder=$folder/$1
  # Files that killed jobs of this run have left. If SLURM does not answer, all of them may still be running.
  if jobs=$(squeue --noheader --format=%A); then
    for other in "$folder"/beit-*.json; do
      grep -qsF "\"run\": \"$name\"" "$other" || continue
      other=${other##*/beit-}
      grep -qxF "${other%.json}" <<<"$jobs" || rm -f "$folder/beit-$other"
    done
  fi
  target=$folder/beit-$SLURM_JOB_ID.json
  printf -v announced '[{"targets": ["%s:%d"], "labels": {"run": "%s", "slurm_job_id": "%s"}}]' \
    "$3" "$METRICS_PORT" "$name" "$JOB"
  trap withdraw EXIT
  # Write under another name first: Prometheus must not read half a file.
  echo "$announced" >"$target.$NODE" && mv "$target.$NODE" "$target" ||
    echo "warning: $target could not be written; Prometheus will not find this job" >&2
}

# withdraw: the end of this script, not of a restart elsewhere, should this host have been cut off meanwhile.
withdraw() {
  rm -f "$target.$NODE"
  [[ $(cat "$target" 2>/dev/null) != "$announced" ]] || rm -f "$target"
}

# attend SIGNAL COMMAND...: run a command that gets SIGNAL when SLURM tells the script to stop. Its exit code; STOPPED
# is USR1 or TERM if there was such a signal.
attend() {
  local code step signal=$1
  [[ -z $STOPPED ]] || return 143
  # $! is set before bash looks at its traps again; a variable would be set too late for a signal that comes at once.
  # shellcheck disable=SC2064 # the signal is known now
  trap "STOPPED=USR1; [[ -n \${!-} ]] && kill -$1 \"\$!\" 2>/dev/null" USR1
  # shellcheck disable=SC2064
  trap "STOPPED=\${STOPPED:-TERM}; [[ -n \${!-} ]] && kill -$1 \"\$!\" 2>/dev/null" TERM
  shift
  "$@" & # in the background, because bash runs a trap only between commands
  step=$!
  [[ -z $STOPPED ]] || kill "-$signal" "$step" 2>/dev/null # the signal came before there was a process
  wait "$step"
  code=$?
  while kill -0 "$step" 2>/dev/null; do # each signal ends `wait` early
    wait "$step"
    code=$?
  done
  return $code
}

# ended: whether SLURM itself ends the job, for good or to requeue it, or has restarted it elsewhere. Do not requeue then:
# scancel sends the same signals as a preemption, so a cancelled job would come back; and on a host that was cut off and
# returns, it would take the restarted job off its hosts.
ended() {
  local facts
  facts=" $(scontrol --oneliner show job "$JOB" 2>/dev/null) "
  [[ $facts =~ \ Restarts=([0-9]+)\  ]] && ((BASH_REMATCH[1] != RESTART)) && return 0
  [[ ${STOPPED:-} == USR1 ]] && return 1 # the time limit
  [[ $facts =~ \ JobState=(COMPLETING|CANCELLED)\  && $facts != *" EndTime=Unknown "* &&
    $facts != *" PreemptTime="[0-9]* ]]
}

# requeue WHAT [CODE]: requeue the job after WHAT and end the script, with CODE if the job is not requeued.
requeue() {
  if ended; then
    echo "$1; SLURM has ended the job, and puts it back itself unless it was cancelled"
    exit "${2:-0}"
  fi
  if ((RESTART >= MAX_RESTARTS)); then
    echo "$1; not requeued after $RESTART restarts (MAX_RESTARTS=$MAX_RESTARTS)"
    exit "${2:-0}"
  fi
  echo "$1; back into the queue"
  scontrol requeue "$JOB" && exit 0
  echo "requeue was refused: SLURM may have done it already" >&2
  exit "${2:-0}"
}

# once OPTIONS COMMAND...: srun with one task on each of its nodes, whatever the job requested per task. A total number of
# GPUs given to sbatch would otherwise be requested of a step on one node, and refused.
once() {
  exec env -u SLURM_GPUS -u SLURM_GPUS_PER_NODE -u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK -u SLURM_NTASKS_PER_NODE \
    -u SLURM_NTASKS_PER_GPU srun --export=ALL --ntasks-per-node=1 "$@"
}

# preflight COMMAND...: check that each host of the job can take part; end the script if one cannot.
preflight() {
  local code hosts=${SLURM_JOB_NUM_NODES:-1}
  # If a host hangs, for example on a file system that does not answer, the step ends before the job's own limit.
  attend TERM once --nodes="$hosts" --ntasks="$hosts" --time=10 \
    ${SLURM_CPUS_PER_TASK:+-c "$SLURM_CPUS_PER_TASK"} "$@" --preflight
  code=$?
  [[ -n $STOPPED ]] && requeue "stopped before the start" 1
  ((code == 0)) && return
  echo "preflight failed with exit code $code, not started and not requeued: the lines above name the hosts and what" \
    "is wrong. sbatch --exclude=HOST leaves a host out" >&2
  exit "$code"
}

# renumber: give the next step a number that no step of the last two starts had. SLURM counts the steps of a restart from
# 0 again, so the srun of a host that was cut off and returns would cancel the restart's step.
renumber() {
  local unused
  for ((unused = RESTART % 3; unused > 0; unused--)); do
    (once --nodes=1 --ntasks=1 --gres=none true)
  done
}

# train COMMAND...: start one rank per task of the job, in the run folder RUN; ends the script.
train() {
  local code word
  echo "job $SLURM_JOB_ID, restart $RESTART, ${SLURM_NTASKS:-?} ranks, rank 0 on $MASTER_ADDR:$MASTER_PORT," \
    "run folder $RUN"
  for word; do # otherwise the markers in RUN would be those of another run
    if [[ $word == --run || $word == --run=* || ($word == run=* && $word != "run=$RUN") ]]; then
      echo "error: got the argument '$word', but the script looks into $RUN. Set RUN in the environment of sbatch" >&2
      exit 2
    fi
  done

  claim "$RUN" "$SLURM_JOB_ID" || exit 2
  [[ $PREFLIGHT == no ]] || preflight "$@"

  # Markers of the last start would mislead the end of this script if the trainer failed before removing them.
  rm -f "$RUN/DONE" "$RUN/PREEMPTED"
  announce train "$RUN" "$MASTER_ADDR"

  renumber
  # srun passes USR1 on to all ranks. `-c` is repeated because srun does not inherit it.
  attend USR1 srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=cores \
    ${SLURM_CPUS_PER_TASK:+-c "$SLURM_CPUS_PER_TASK"} "$@"
  code=$?

  # Trust the markers: exit codes pass through too many hands.
  if [[ -f $RUN/DONE ]]; then
    echo "done"
    exit 0
  fi
  [[ -f $RUN/PREEMPTED ]] && requeue "stopped with a complete checkpoint"
  # A signal ends ranks that are not listening for it yet.
  [[ -n $STOPPED ]] && ((code > 128)) && requeue "stopped before the ranks could save; the last checkpoint holds" "$code"
  echo "failed with exit code $code and not requeued; see $RUN/FAILED and $RUN/ranks" >&2
  exit $((code == 0 ? 1 : code))
}
