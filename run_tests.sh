#!/usr/bin/env bash
# Sets up .venv with the development tools, checks the style and runs the test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_venv.sh requirements.txt requirements-dev.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
ruff check .
exec python -m pytest "$@"
