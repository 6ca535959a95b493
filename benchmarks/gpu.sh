#!/usr/bin/env bash
# What a GPU does with this project, in ten minutes at most: the tests that compare it with the CPU, then the speeds,
# into benchmarks/RESULTS.md. Arguments go to bench_gpu.py; --smoke runs everything briefly, on a CPU, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python)}
[[ " $* " == *" --smoke "* ]] || "$python" -m pytest -q -m gpu tests
[[ " $* " == *" --smoke "* || " $* " == *" --write "* ]] || set -- "$@" --write benchmarks/RESULTS.md
exec timeout 600 "$python" benchmarks/bench_gpu.py "$@"
