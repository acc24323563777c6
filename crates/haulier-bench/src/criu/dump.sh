#!/bin/bash
# The source's part of a migration with CRIU alone.
# Usage: dump.sh copy|lazy CRIU PID ADDRESS PEER PORT
set -eu
mode=$1 criu=$2 pid=$3 address=$4 peer=$5 port=$6
images=/dev/shm/bench
rm -rf "$images" && mkdir "$images" && cd "$images"
# A lazy dump keeps two descriptors for every 4 MiB of the target.
ulimit -n "$(ulimit -H -n)"

# To tmpfs, so that no disk counts; the connection's packets are dropped from the freeze on.
dump() {
    "$criu" dump -t "$pid" -D "$images" -o dump.log -v2 \
        --tcp-established --network-lock nftables --manage-cgroups=ignore "$@"
}

give_address() {
    ip addr del "$(ip -4 -o addr show to "$address" | awk '{ print $4 }')" dev eth0
}
send() { tar -b 2048 -cf - -C "$images" . | socat -u -b 1048576 - "TCP:$peer:$port"; }

case $mode in
copy)
    dump
    give_address
    send
    ;;
lazy)
    # CRIU writes a byte when everything but the lazy pages is in the images, and serves those
    # until the destination has them all.
    mkfifo ready
    dump --lazy-pages --address 0.0.0.0 --port "$((port + 1))" --status-fd 9 9<>ready &
    dumper=$!
    exec 8<>ready
    head -c 1 <&8 >/dev/null
    rm ready
    give_address
    send
    wait "$dumper"
    ;;
esac
rm -rf "$images"
