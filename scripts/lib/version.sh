# Comparing dotted versions.
# shellcheck shell=bash

# Succeeds if $1 is $2 or newer.
version_at_least() {
    [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]
}
