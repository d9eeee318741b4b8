# shellcheck shell=bash
# What the scripts in ci/ share.
source "$(dirname "${BASH_SOURCE[0]}")/env"
PROGRAM=$(basename "$0")

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

now_ms() { echo "$((${EPOCHREALTIME//[!0-9]/} / 1000))"; }

# seconds_since START_MS: print the seconds, with one decimal.
seconds_since() {
  local ms=$(($(now_ms) - $1))
  echo "$((ms / 1000)).$((ms % 1000 / 100))"
}

# timed NAME COMMAND...: run the command; say its name before and the seconds after. Not after `if` or `||`: there
# bash ignores `set -e` in the command.
timed() {
  local name=$1 start
  shift
  start=$(now_ms)
  say "$name ..."
  "$@"
  say "$name: $(seconds_since "$start") s"
}

# Print the path of a Python 3.11, the real one behind shims and virtual environments; fails where there is none.
find_python() {
  local name
  for name in python3.11 python3 python; do
    "$name" -c '
import os, sys
if sys.version_info[:2] != (3, 11): sys.exit(1)
print(os.path.realpath(sys.executable))' 2>/dev/null && return
  done
  return 1
}
