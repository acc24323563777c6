# Copies lines, a few a second until the file $1 exists, then as fast as it can: so whoever writes
# to it waits on a full pipe.
while read -r line; do
    echo "$line"
    [ -e "$1" ] || sleep 0.01
done
