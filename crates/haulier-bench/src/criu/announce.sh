#!/bin/sh
# CRIU's action script at the destination: announces the address just before the target runs, so
# that its first answer finds a client that sends here.
[ "${CRTOOLS_SCRIPT_ACTION:-}" = pre-resume ] || exit 0
echo 0 >/proc/sys/net/ipv4/conf/all/arp_ignore
# arping would keep the target waiting for a second.
exec @BENCH@ announce @ADDRESS@
