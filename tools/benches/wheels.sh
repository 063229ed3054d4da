#!/usr/bin/env bash
# Wheels of everything that the benchmarks need besides PyTorch, for a GPU machine without a network.
#
#   tools/benches/wheels.sh OUT [PYTHON_VERSION]      (the GPU machine's; default: this one's)
#
# Run it where PyPI is at hand, with the virtual environment of `make test` (or name a Python by PYTHON=...).
set -euo pipefail
out=${1:?usage: tools/benches/wheels.sh OUT [PYTHON_VERSION]}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
version=${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
mkdir -p "$out"

# What the benchmarks import, and all that it depends on; nothing that comes with PyTorch or that they do without.
mapfile -t wanted < <("$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

with_pytorch = {"torch", "triton", "numpy", "setuptools", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"}
left_out = {"s3fs", "matplotlib", "hf-xet"}
found, left = {}, ["beit_dist", "transformers", "packaging"]
while left:
    name = canonicalize_name(left.pop())
    if name in found or name in with_pytorch | left_out or name.startswith("nvidia-"):
        continue
    try:
        about = distribution(name)
    except PackageNotFoundError:
        continue
    found[name] = about.version
    requirements = map(Requirement, about.requires or [])
    left += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
del found["beit-dist"]
print(*(f"{name}=={version}" for name, version in found.items()), sep="\n")
PYTHON
)
for package in "${wanted[@]}"; do
  case $package in
    deepspeed==*) DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$out" "$package" ;;
    *) "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
         --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
         --platform any -d "$out" "$package" ;;
  esac
done
du -sh "$out"
