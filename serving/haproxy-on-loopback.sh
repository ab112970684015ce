#!/bin/sh
# Stands in for the HAProxy binary (serving/ingress.py). Ray Serve binds HAProxy's metrics and statistics
# to every interface; this rewrites those two lines of the configuration, and no other, before each start.
config=""
previous=""
for argument in "$@"; do
  [ "$previous" = "-f" ] && config="$argument"
  previous="$argument"
done
if [ -n "$config" ]; then
  for port in "$RAY_SERVE_HAPROXY_METRICS_PORT" "$RAY_SERVE_HAPROXY_STATS_PORT"; do
    sed -i "s/^\( *bind \)\*\{0,1\}:$port\$/\1127.0.0.1:$port/" "$config"
  done
fi
exec "$TANDEM_HAPROXY_BINARY" "$@"
