# Makes the environment that the other scripts run in:  EXTRAS="[hf,dev]" source runs/setup.sh
# Needs bash and Python >= 3.10 with venv. PYTHON chooses the interpreter, VENV the folder (default .venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
EXTRAS="${EXTRAS:-[fast]}"

if ! "$PYTHON" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $PYTHON is not Python >= 3.10 with venv; set PYTHON=/path/to/python3.10 or install python3-venv" >&2
    exit 2
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

# Installed once per set of extras and pins; the stamp says which.
stamp="$VENV/.nanosae$EXTRAS"
want="$(cat constraints.txt pyproject.toml)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
    echo "installing into $VENV (once; a few minutes)"
    "$VENV/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".$EXTRAS"
    printf '%s' "$want" > "$stamp"
fi
PY="$VENV/bin/python"
