#!/usr/bin/env bash
# The tests of the compiled code, compiled so that it watches over itself: reads and writes beyond the end of what was
# allocated (AddressSanitizer) and what C leaves undefined (UndefinedBehaviorSanitizer) end the test run with a report.
# Arguments go to pytest in place of the usual selection.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_venv.sh requirements.txt requirements-dev.txt

export CC=${CC:-gcc}
flags="-O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
library=$($CC -print-file-name=libasan.so 2>/dev/null || true)
if [ ! -e "$library" ] || ! echo 'int main(void) { return 0; }' | $CC $flags -x c - -o /dev/null 2>/dev/null; then
    echo "no sanitizers: $CC does not bring libasan and libubsan; the compiled code is not checked with them"
    exit 0
fi
export NATIVE_CFLAGS=$flags OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 # Python itself never gives all of its memory back
[ $# -gt 0 ] || set -- tests/test_{linear_kernels,decoder_step,paged_cache,int4,fused_parts}.py tests/test_native_code.py::test_a_write_beyond_the_end_is_seen
# The C++ library comes with it, as PyTorch's exceptions pass through; without --capture the report would be lost
LD_PRELOAD="$library $($CC -print-file-name=libstdc++.so.6)" exec python -m pytest --capture=sys "$@"
