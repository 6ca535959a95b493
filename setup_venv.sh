# Sourced by run_training.sh and run_tests.sh: makes .venv if it is missing, installs the given requirement files
# if they have changed since, and activates it. PYTHON chooses the interpreter.

fail() { echo "error: $1" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

venv_bin() { if [ -d .venv/Scripts ]; then echo .venv/Scripts; else echo .venv/bin; fi; }  # Windows has Scripts

# Of two scripts that start together the second waits; where there is no flock (macOS, Windows), nobody does
if command -v flock >/dev/null; then exec 9<. && { flock 9 || true; }; fi

if ! "$(venv_bin)/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || fail "Python 3.10 to 3.14 is needed; install one, or name it in the variable PYTHON"
    echo "making .venv with $("$python" --version)"
    rm -rf .venv
    # Debian's python3 comes without ensurepip; virtualenv brings its own
    "$python" -m venv .venv 2>/dev/null || { rm -rf .venv; "$python" -m virtualenv -q .venv 2>/dev/null; } \
        || fail "$python cannot make a virtual environment; install the package python3-venv (or virtualenv) and try again"
fi
source "$(venv_bin)/activate"

for file in "$@"; do
    stamp=.venv/installed-$file
    if ! cmp -s "$file" "$stamp"; then
        echo "installing $file"
        python -m pip install --quiet --disable-pip-version-check -r "$file" \
            || fail "the packages of $file could not be installed (see above); check the network and try again"
        cp "$file" "$stamp"
    fi
done
exec 9<&-
