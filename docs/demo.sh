#!/usr/bin/env bash
# Build, serve, one request and a short measurement, on the bundled sample: what `make demo` runs, in ./demo.
set -euo pipefail
mkdir -p demo
cd demo

step() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }

step prune2serve build --ratio 0.25 --force

printf '\n\033[1m$ prune2serve serve &\033[0m\n' >&2
prune2serve serve --port 0 2>serve.log &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
for _ in $(seq 600); do
    url=$(sed -n 's/^Serving .* on \(http[^ ]*\).*/\1/p' serve.log)
    [ -n "$url" ] && break
    kill -0 "$server" 2>/dev/null || { cat serve.log >&2; exit 1; }
    sleep 0.5
done
[ -n "$url" ] || { cat serve.log >&2; echo "the endpoint was not ready within 5 minutes" >&2; exit 1; }
cat serve.log >&2

step curl -sS --fail "$url/v1/chat/completions" -H 'content-type: application/json' -d '{
    "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 40, "temperature": 0}'
echo
kill "$server"
wait "$server" || true
trap - EXIT

step prune2serve measure --quick --output measure --force
echo "The report: $(pwd)/measure/report.html" >&2
