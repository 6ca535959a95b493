#!/usr/bin/env bash
# From an empty clone to a served, aligned model: sets up .venv, then runs every stage (pipeline.py).
#
#   bash run_training.sh                 the sample data, a size for two CPU cores: a quarter of an hour, longer with AVX2 alone
#   bash run_training.sh --smoke         a two-minute check of every stage
#   bash run_training.sh --preset small  larger (a GPU is wanted)
#   bash run_training.sh --help          all options
#
# Interrupted, it continues where it was; finished stages are skipped unless their inputs changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_venv.sh requirements.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python pipeline.py "$@"
