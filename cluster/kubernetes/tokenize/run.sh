#!/usr/bin/env bash
# The offline job: runs each step once the one before is complete. Run it again after a failure: it makes what is missing.
#
#   run.sh [FOLDER]    FOLDER: a kustomization on top of this folder; by default this one
set -euo pipefail

folder=${1:-$(dirname "$0")}

for step in freeze work finish; do
  job=beit-tokenize-$step
  kubectl delete job "$job" --ignore-not-found # left by an earlier start
  kubectl apply -k "$folder" -l "beit-dist/step=$step"
  ended=
  until [[ $ended == *Complete* || $ended == *Failed* ]]; do
    sleep "${POLL_SECONDS:-10}"
    ended=$(kubectl get job "$job" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}') ||
      true # it is asked again
  done
  if [[ $ended == *Failed* ]]; then
    echo "error: $job failed. Its pods say why: kubectl logs -l beit-dist/step=$step --prefix" >&2
    exit 1
  fi
done
