#!/usr/bin/env bash
# Sets up .venv with the development tools, checks the style and runs the test suite. Arguments go to pytest:
# `-n 0` runs everything in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_venv.sh requirements.txt requirements-dev.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
ruff check .
# One worker a core, each with whole files, which are already in a good order; beyond four, the longest file decides
workers=$(python -c 'import os; print(min(os.cpu_count(), 4))')
exec python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
