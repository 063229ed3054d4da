#!/usr/bin/env bash
# What a pod of the training Job runs: check the settings, start this node's ranks, and give the Job an exit code
# that tells how the run ended. torchrun's own code does not: it turns a rank's 2 into 1, and a stopped run into 0, after
# which the Job would count this index as complete and never start it again.
#
#   0 done    2 the input is wrong    75 stopped with a complete checkpoint    anything else: failed, try again
set -u

rank_of_node=$JOB_COMPLETION_INDEX
python=${PYTHON:-python}

# Nothing is lost if the launcher has not begun.
launcher=
trap '[[ -n $launcher ]] || exit 75; kill -TERM "$launcher" 2>/dev/null' TERM INT

# Wrong settings are found here, before a launcher can hide the exit code.
"$python" -m "$MODULE" "$@" --dry-run --ranks $((NODES * GPUS_PER_NODE)) || exit $?

# Markers of the last start would mislead the end of this script.
[[ $rank_of_node == 0 ]] && rm -f "$RUN/DONE" "$RUN/PREEMPTED" "$RUN/FAILED"

# A pod's name can be looked up only some seconds after the pod has started.
for ((tries = 0; tries < ${DNS_SECONDS:-300}; tries++)); do
  getent hosts "$MASTER_ADDR" >/dev/null && break
  sleep 1
done

# Ranks that refuse the start leave this file and no marker; torchrun hides their exit code.
export BEIT_DIST_REFUSED=${TMPDIR:-/tmp}/beit-refused
rm -f "$BEIT_DIST_REFUSED"

"$python" -m torch.distributed.run --nnodes "$NODES" --node-rank "$rank_of_node" \
  --nproc-per-node "$GPUS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$SHUTDOWN_SECONDS" \
  -m "$MODULE" "$@" &
launcher=$!

# When the ranks of this pod have ended, torchrun waits up to 300 seconds for the launchers of all other pods. The launcher
# of a deleted pod is gone, and during this wait the replacements would meet at this pod.
left=${TMPDIR:-/tmp}/beit-left
rm -f "$left"
has_ranks() {
  local state parent
  while read -r _ _ state parent _; do
    [[ $parent == "$1" && $state != Z ]] && return
  done < <(cat /proc/[0-9]*/stat | sed 's/(.*)/name/')
  return 1
}
leave() {
  while ! has_ranks "$1"; do sleep 1; done # the ranks have not been started
  while has_ranks "$1"; do sleep 1; done
  sleep "${LEAVE_SECONDS:-10}"
  touch "$left"
  kill -KILL "$1" # it hears no other signal while it waits
}
leave "$launcher" 2>/dev/null &
watcher=$!

wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
  wait "$launcher"
  code=$?
done

kill "$watcher" 2>/dev/null

[[ -e $BEIT_DIST_REFUSED ]] && exit 2

# Rank 0's marker may appear after the ranks here have ended, depending on how fast the file system is.
[[ -e $left ]] && code=0
for ((tries = 0; code == 0 && tries < ${MARKER_SECONDS:-60}; tries++)); do
  [[ -f $RUN/DONE || -f $RUN/PREEMPTED || -f $RUN/FAILED ]] && break
  sleep 1
done

[[ -f $RUN/DONE ]] && exit 0
[[ -f $RUN/PREEMPTED ]] && exit 75
grep -qs '"exit_code": 2\b' "$RUN/FAILED" && exit 2
exit $((code == 0 || code == 2 ? 1 : code))
