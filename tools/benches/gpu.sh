#!/usr/bin/env bash
# `beit bench gpu` on a machine that has PyTorch for CUDA, and nothing of ours.
#
#   tools/benches/gpu.sh WHEELS [ARGUMENT ...]        arguments are those of `beit bench gpu`
#
# WHEELS is what tools/benches/wheels.sh wrote. Nothing is downloaded, and PyTorch is the machine's own.
set -euo pipefail
wheels=${1:?usage: tools/benches/gpu.sh WHEELS [ARGUMENT ...]}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$(mktemp -d)/venv
# --without-pip: some images have no ensurepip; the machine's own pip installs into the environment.
python3 -m venv --system-site-packages --without-pip "$venv"
python3 -m pip --python "$venv/bin/python" install -q --no-index --no-deps "$wheels"/*.whl
cd "$here"
exec "$venv/bin/python" tools/bench.py gpu "$@"
