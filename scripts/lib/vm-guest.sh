#!/bin/busybox sh
# What the guest of scripts/test-vm does: first as the initial file system, then, from a tmpfs, as
# its init. (Tests' hosts pivot their root, which the initial file system cannot.)
# shellcheck shell=dash

haulier=/usr/bin/haulier
lab=/usr/bin/haulier-lab
export PATH=/usr/bin:/usr/sbin:/bin:/sbin
export HAULIER_CRIU=/opt/haulier/criu/sbin/criu

say() {
    echo "guest: $*"
}

first() {
    /bin/busybox mount -t tmpfs -o size=1200m none /new
    for part in bin sbin lib lib64 usr opt etc guest steps; do
        [ ! -e "/$part" ] || /bin/busybox cp -a "/$part" /new/
    done
    /bin/busybox mkdir -p /new/proc /new/sys /new/dev /new/tmp /new/run /new/root /new/srv /new/var/lib /new/var/log
    exec /bin/busybox switch_root /new /bin/busybox sh /guest second
}

second() {
    /bin/busybox --install -s /bin
    mount -t proc none /proc
    mount -t sysfs none /sys
    mount -t devtmpfs none /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts none /dev/pts
    mount -t tmpfs none /dev/shm
    mount -t tmpfs none /run
    mount -t tmpfs none /tmp
    mount -t cgroup2 none /sys/fs/cgroup
    hostname guest
    ip link set lo up
    for module in crc32c_generic veth bridge nf_tables nft_ct nft_log nft_queue nfnetlink nfnetlink_log nfnetlink_queue \
        unix_diag inet_diag tcp_diag udp_diag raw_diag netlink_diag af_packet_diag tun sch_tbf sch_netem; do
        modprobe "$module" || say "no module $module"
    done
    say "up after $(cut -d ' ' -f 1 /proc/uptime) s: Linux $(uname -r), $(nproc) CPUs"
    failed=
    while read -r step; do
        say "step $step"
        # A process of its own, so that the first command that fails ends the step.
        if sh /guest "step_$step" </dev/null; then
            say "step $step: ok"
        else
            say "step $step: FAILED"
            failed="$failed $step"
        fi
    done </steps
    # On a line of its own, whatever was printed last.
    echo
    echo "haulier-vm-result: ${failed:+failed:}${failed:-ok}"
    sync
    poweroff -f
}

step_kernel() {
    case $(uname -r) in
        6.1.*) ;;
        *) say "this is no 6.1"; return 1 ;;
    esac
    "$HAULIER_CRIU" check --feature mem_dirty_track
    "$HAULIER_CRIU" check
}

step_tracker() {
    tracker_check soft-dirty /usr/bin/tracked
}

# haulier's report says how pages were found; the program's own says whether its memory is right.
step_migration() {
    $lab up --hosts 2 || { dmesg | tail -n 20; return 1; }
    $lab exec host2 -d -- $haulier serve --listen 10.77.0.2:7000 >/dev/null
    pid=$($lab exec host1 -d -- $lab workload threads --threads 2 --memory 64 --pages-per-second 500 --report /tmp/status)
    wait_for has_lines 10
    $lab exec host1 -- $haulier migrate "$pid" 10.77.0.2:7000 --tracker soft-dirty --json >/tmp/report || {
        cat /tmp/report
        return 1
    }
    cat /tmp/report
    grep -q '"tracker": *"soft-dirty"' /tmp/report
    $lab exec host2 -- /bin/busybox kill -0 "$pid"
    # It has looked at all its pages a few times by then.
    wait_for has_lines $(($(wc -l </tmp/status) + 50))
    say "the program's last word: $(tail -n 1 /tmp/status)"
    tail -n 1 /tmp/status | grep -q '"errors":0'
    $lab down
}

has_lines() {
    [ "$(wc -l </tmp/status)" -ge "$1" ]
}

# Runs a command until it succeeds.
wait_for() {
    tries=0
    until "$@" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 600 ] || { say "in vain: $*"; return 1; }
        sleep 0.1
    done
}

# Only a step ends at its first failure: without its init there is no guest.
set -u
case $1 in step_*) set -e ;; esac
"$1"
