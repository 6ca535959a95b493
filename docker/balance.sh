#!/bin/sh
# Runs nginx before all containers of the service `replica`; those that come and go are seen within seconds.
set -eu
NAME=${REPLICA:-replica}
PORT=8000

list() { getent ahostsv4 "$NAME" | awk '{print $1}' | sort -u; }

# One server a line. A replica that cannot be reached is left alone for two seconds.
write() { # addresses
    for address in $1; do
        echo "server $address:$PORT max_fails=1 fail_timeout=2s;"
    done >/tmp/replicas.new
    mv /tmp/replicas.new /tmp/replicas.conf
}

known=$(list)
while [ -z "$known" ]; do
    echo "waiting for containers of the service $NAME" >&2
    sleep 1
    known=$(list)
done
write "$known"
nginx -g 'daemon off;' &
nginx=$!
trap 'kill -QUIT $nginx; wait $nginx; exit 0' TERM INT QUIT # answers under way end first
while kill -0 $nginx 2>/dev/null; do
    sleep 2 &
    wait $! || true
    now=$(list)
    if [ -n "$now" ] && [ "$now" != "$known" ]; then
        known=$now
        write "$known"
        nginx -s reload
        echo "replicas: $(echo $known)" >&2
    fi
done
exit 1
