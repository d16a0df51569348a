# shellcheck shell=bash
# Functions for the other scripts, which source this file. `make_environment FOLDER EXTRAS` makes a virtual environment
# with this project in FOLDER and puts its programs first on PATH. Nothing outside FOLDER changes.

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 to 3.13: PATH; install one, or name one: PYTHON=/path/to/python bash $0" >&2
    return 69
}

make_environment() {
    local folder=$1 extras=$2 python made_from quiet=()
    python=$(find_python) || return
    # Install again only if the Python version, the requirements or the extras have changed.
    made_from=$("$python" --version; echo "$extras"; cat setup.cfg pyproject.toml scripts/constraints.txt)
    unset PYTHONPATH PYTHONHOME
    if [ "$made_from" != "$(cat "$folder/made-from" 2>/dev/null)" ]; then
        echo "installing into $folder (takes some minutes the first time)"
        [ -t 1 ] || quiet=(--quiet --quiet) # a terminal shows pip's progress
        "$python" -m venv --clear "$folder"
        "$folder/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check --upgrade pip
        "$folder/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
            --constraint scripts/constraints.txt --editable ".[$extras]"
        echo "$made_from" >"$folder/made-from"
    fi
    export PATH="$PWD/$folder/bin:$PATH" VIRTUAL_ENV="$PWD/$folder"
}
