# shellcheck shell=bash
# What the batch scripts share. They read it after `cd` into the folder that sbatch was called in.
#
# Sets PYTHON, MAX_RESTARTS, PREFLIGHT, JOB (its name for scontrol), RESTART, NODE, MASTER_ADDR, MASTER_PORT and METRICS_PORT.

ulimit -c 0
# Until there is something to stop, the first of SLURM's signals is only noted.
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

# SLURM sets many of its variables only for options that were given.
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
# The last task of an array has the array's own number, which to scontrol means all tasks.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-$SLURM_JOB_ID}
RESTART=${SLURM_RESTART_COUNT:-0}
if ((RESTART > MAX_RESTARTS)); then # SLURM has put it back by itself, as after the loss of a node
  echo "error: not started, after $RESTART restarts (MAX_RESTARTS=$MAX_RESTARTS)" >&2
  exit 1
fi
NODE=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
NODE=${NODE:-$(hostname)} # the script runs on the first node
export MASTER_ADDR=${MASTER_ADDR:-$NODE}
# Twenty ports for each job: neighbouring jobs and the restarts of one never share a port. All are below 32768,
# from where Linux takes ports for outgoing connections. Each task of an array is a job with a number of its own.
export MASTER_PORT=$((10000 + (SLURM_JOB_ID % 1000) * 20 + RESTART % 10))
METRICS_PORT=$((MASTER_PORT / 20 * 20 + 10)) # of the same twenty, and no restart's own

# announce train|tokenize FOLDER HOST: tell Prometheus where the metrics are for as long as this script runs.
announce() {
  [[ -n ${BEIT_TARGETS:-} ]] || return 0
  local folder=$BEIT_TARGETS name=${2%/} jobs other
  name=${name##*/}
  [[ -d $folder/$1 ]] && folder=$folder/$1
  # What killed jobs of this run have left. Without an answer of SLURM all may still run.
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
  # Under another name first: Prometheus must not read half a file.
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
  "$@" & # in the background, since bash runs a trap only between commands
  step=$!
  [[ -z $STOPPED ]] || kill "-$signal" "$step" 2>/dev/null # it came before there was a process
  wait "$step"
  code=$?
  while kill -0 "$step" 2>/dev/null; do # each signal ends `wait` early
    wait "$step"
    code=$?
  done
  return $code
}

# ended: whether SLURM ends the job by itself, for good or to put it back, or has started it again elsewhere. After scancel,
# whose signals are those of a preemption, it would put the job back if it were asked to; and from a host that was cut off
# and returns it would take the restart off its hosts.
ended() {
  local facts
  facts=" $(scontrol --oneliner show job "$JOB" 2>/dev/null) "
  [[ $facts =~ \ Restarts=([0-9]+)\  ]] && ((BASH_REMATCH[1] != RESTART)) && return 0
  [[ ${STOPPED:-} == USR1 ]] && return 1 # the time limit
  [[ $facts =~ \ JobState=(COMPLETING|CANCELLED)\  && $facts != *" EndTime=Unknown "* &&
    $facts != *" PreemptTime="[0-9]* ]]
}

# requeue WHAT [CODE]: put the job back after WHAT and end the script, with CODE if the job is not put back.
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

# once OPTIONS COMMAND...: srun with one task on each of its nodes, whatever the job has asked for each task. What sbatch
# was given for GPUs in all would be asked of a step on one node, and be refused.
once() {
  exec env -u SLURM_GPUS -u SLURM_GPUS_PER_NODE -u SLURM_GPUS_PER_TASK -u SLURM_TRES_PER_TASK -u SLURM_NTASKS_PER_NODE \
    -u SLURM_NTASKS_PER_GPU srun --export=ALL --ntasks-per-node=1 "$@"
}

# preflight COMMAND...: whether each host of the job can take part; ends the script where one cannot.
preflight() {
  local code hosts=${SLURM_JOB_NUM_NODES:-1}
  # The step ends before the job's own limit if a host hangs, as on a file system that does not answer.
  attend TERM once --nodes="$hosts" --ntasks="$hosts" --time=10 \
    ${SLURM_CPUS_PER_TASK:+-c "$SLURM_CPUS_PER_TASK"} "$@" --preflight
  code=$?
  [[ -n $STOPPED ]] && requeue "stopped before the start" 1
  ((code == 0)) && return
  echo "preflight failed with exit code $code, not started and not requeued: the lines above name the hosts and what" \
    "is wrong. sbatch --exclude=HOST leaves a host out" >&2
  exit "$code"
}

# renumber: give the next step a number that the steps of the last two starts did not have. SLURM counts the steps of a
# restart from 0 again, so srun of a host that was cut off would, when that returns, cancel the restart's step.
renumber() {
  local unused
  for ((unused = RESTART % 3; unused > 0; unused--)); do
    (once --nodes=1 --ntasks=1 --gres=none true)
  done
}

# train COMMAND...: one rank for each task of the job, in the run folder RUN; ends the script.
train() {
  local code word
  echo "job $SLURM_JOB_ID, restart $RESTART, ${SLURM_NTASKS:-?} ranks, rank 0 on $MASTER_ADDR:$MASTER_PORT," \
    "run folder $RUN"
  for word; do # the markers in RUN would be those of another run
    if [[ $word == --run || $word == --run=* || ($word == run=* && $word != "run=$RUN") ]]; then
      echo "error: got the argument '$word', but the script looks into $RUN. Set RUN in the environment of sbatch" >&2
      exit 2
    fi
  done

  claim "$RUN" "$SLURM_JOB_ID" || exit 2
  [[ $PREFLIGHT == no ]] || preflight "$@"

  # Markers of the last start would mislead the end of this script if the trainer fails before it removes them.
  rm -f "$RUN/DONE" "$RUN/PREEMPTED"
  announce train "$RUN" "$MASTER_ADDR"

  renumber
  # srun passes USR1 on to all ranks. `-c` again: srun does not inherit it.
  attend USR1 srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=cores \
    ${SLURM_CPUS_PER_TASK:+-c "$SLURM_CPUS_PER_TASK"} "$@"
  code=$?

  # The markers tell the truth; exit codes pass through too many hands.
  if [[ -f $RUN/DONE ]]; then
    echo "done"
    exit 0
  fi
  [[ -f $RUN/PREEMPTED ]] && requeue "stopped with a complete checkpoint"
  # A signal ends ranks that have not begun to listen to it.
  [[ -n $STOPPED ]] && ((code > 128)) && requeue "stopped before the ranks could save; the last checkpoint holds" "$code"
  echo "failed with exit code $code and not requeued; see $RUN/FAILED and $RUN/ranks" >&2
  exit $((code == 0 ? 1 : code))
}
