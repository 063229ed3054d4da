#!/usr/bin/env bash
# Whether steps are completing: /healthz of rank 0's metrics. Other pods serve none, and are healthy while they run.
#
#   healthy.sh PORT
set -u

[[ $JOB_COMPLETION_INDEX == 0 ]] || exit 0
exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
printf 'GET /healthz HTTP/1.0\r\n\r\n' >&3
read -r _ status _ <&3
[[ $status == 200 ]]
