# Debian packages: what is missing, and how to install it without starting a service.
# shellcheck shell=bash

export DEBIAN_FRONTEND=noninteractive

apt_lock_wait=600 # seconds another apt may hold the lock
apt_policy=/usr/sbin/policy-rc.d
apt_policy_mark='# haulier: temporary, while packages are installed'

# Prints those of the given packages that are not installed.
apt_missing() {
    local package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true) == installed ]] ||
            printf '%s\n' "$package"
    done
}

# Refreshes the package lists, once per script.
apt_update() {
    [[ -z ${apt_updated:-} ]] || return 0
    say "apt-get update"
    apt-get -qq -o DPkg::Lock::Timeout="$apt_lock_wait" update >&2 || die "apt-get update failed (see above)"
    apt_updated=1
}

# The version that apt would install of a package; nothing if there is none.
apt_candidate() {
    apt-cache policy "$1" 2>/dev/null | sed -n 's/^ *Candidate: *//p' | grep -v '^(none)$' || true
}

# Forbids services to start, unless the machine has a policy of its own. One that a killed run
# left behind is ours, and is replaced and removed.
apt_forbid_services() {
    [[ ! -e $apt_policy ]] || apt_policy_is_ours || return 0
    printf '#!/bin/sh\n%s\nexit 101\n' "$apt_policy_mark" >"$apt_policy"
    chmod 0755 "$apt_policy"
}

apt_policy_is_ours() {
    grep -qxF "$apt_policy_mark" "$apt_policy" 2>/dev/null
}

apt_allow_services() {
    ! apt_policy_is_ours || rm -f "$apt_policy"
}

# A subshell, for the sake of its trap.
apt_install_quietly() (
    trap apt_allow_services EXIT
    apt_forbid_services
    apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout="$apt_lock_wait" \
        -o Dpkg::Use-Pty=0 install "$@" >/dev/null
)

# Redis and PostgreSQL are wanted as programs, not as services of this machine: neither now nor at
# the next boot.
apt_disable_service() {
    deb-systemd-helper disable "$1.service" >/dev/null 2>&1 || true
    update-rc.d "$1" disable >/dev/null 2>&1 || true
    # Under a policy-rc.d of the machine's own that allows services, it has started.
    [[ ! -d /run/systemd/system ]] || systemctl --quiet stop "$1.service" || true
}

# Installs those of the given packages that are missing.
apt_install() {
    local missing service
    mapfile -t missing < <(apt_missing "$@")
    [[ ${#missing[@]} -gt 0 ]] || return 0
    need_root "packages are to be installed: ${missing[*]}"
    apt_update
    say "installing ${missing[*]}"
    apt_install_quietly "${missing[@]}" || die "apt-get install failed (see above)"
    for service in redis-server postgresql; do
        [[ " ${missing[*]} " != *" $service "* ]] || apt_disable_service "$service"
    done
}
