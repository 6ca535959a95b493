#!/usr/bin/env bash
# Tries a folder of data files, in whatever published shape, through every stage at smoke size, and prints a table:
# what was read, left out, cut, trained and scored.
#
#   bash benchmarks/real_data.sh DIR [options of benchmarks/real_data.py]
set -euo pipefail
data=$(realpath "${1:?which folder of data files?}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -x .venv/bin/python ]] && PATH="$PWD/.venv/bin:$PATH"
exec python benchmarks/real_data.py --data "$data" "$@"
