#!/bin/sh
# The destination's part of a migration with CRIU alone. Says "ready" when the source may begin.
# Usage: restore.sh copy|lazy CRIU ADDRESS PEER PORT
set -eu
mode=$1 criu=$2 address=$3 peer=$4 port=$5
images=/dev/shm/bench
rm -rf "$images" && mkdir "$images" && cd "$images"

restore() {
    "$criu" restore -d -D "$images" -o restore.log -v2 --action-script /run/announce.sh \
        --tcp-established --network-lock nftables --manage-cgroups=ignore "$@"
}

# Sockets need the address before they are restored. Nobody is to hear of it before the target can
# answer, or its clients' connections would be reset: level 3 answers no ARP for addresses of
# scope host.
echo 3 >/proc/sys/net/ipv4/conf/all/arp_ignore
socat -u -b 1048576 "TCP-LISTEN:$port,reuseaddr" - | tar -b 2048 -xf - &
receiver=$!
while ! ss -Htln "sport = :$port" | grep -q .; do sleep 0.01; done
echo ready
wait "$receiver"
ip addr add "$address/32" dev eth0 scope host

case $mode in
copy) restore ;;
lazy)
    mkfifo ready
    "$criu" lazy-pages --page-server --address "$peer" --port "$((port + 1))" \
        -D "$images" -o lazy-pages.log -v2 --status-fd 9 9<>ready &
    daemon=$!
    exec 8<>ready
    head -c 1 <&8 >/dev/null
    restore --lazy-pages
    wait "$daemon"
    ;;
esac
rm -rf "$images"
