# Messages. Everything goes to stderr, so that a script's stdout is its answer.
# shellcheck shell=bash

say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
    say "$*"
    exit 1
}

need_root() {
    [[ $(id -u) -eq 0 ]] || die "must run as root: $1"
}
