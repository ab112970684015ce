#!/bin/sh
# Stands in for the HAProxy binary (serving/ingress.py). Before each start it changes the configuration that
# Ray Serve wrote: metrics and statistics on loopback, where TANDEM_HAPROXY_LOOPBACK says so; the replicas of a
# model's second kind beside those of the first (haproxy-kinds.awk); and, for the moment after a start in which
# no application is known, 503 and Retry-After rather than 404, which tells a caller to give up.
config=""
previous=""
for argument in "$@"; do
  [ "$previous" = "-f" ] && config="$argument"
  previous="$argument"
done
if [ -n "$config" ]; then
  if [ -n "$TANDEM_HAPROXY_LOOPBACK" ]; then
    for port in "$RAY_SERVE_HAPROXY_METRICS_PORT" "$RAY_SERVE_HAPROXY_STATS_PORT"; do
      sed -i "s/^\( *bind \)\*\{0,1\}:$port\$/\1127.0.0.1:$port/" "$config"
    done
  fi
  if ! grep -q "^ *use_backend " "$config"; then
    unknown=' content-type text/plain string "No model is known yet: try again" hdr Retry-After 1'
    sed -i "s|^\( *http-request return status \)404 content-type text/plain lf-string .*|\1503$unknown|" "$config"
  fi
  if grep -q " path /-kinds" "$config" && ! grep -q " agent-check " "$config"; then
    awk -v offset="${TANDEM_WEIGHT_PORTS:-0}" -f "${0%.sh}-kinds.awk" "$config" "$config" > "$config.kinds" &&
      mv "$config.kinds" "$config"
  fi
fi
exec "$TANDEM_HAPROXY_BINARY" "$@"
