#!/usr/bin/env bash
# Start a server with cerberus, ask it over HTTP, look at its counters, stop it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$here/reference_model/weights}
port=${PORT:-8765}

"$here/../.venv/bin/vllm-accel" serve "$model" --speculative-config cerberus \
  --port "$port" --max-model-len 1024 --kv-cache-memory-bytes 256M &
server=$!
trap 'kill "$server"; wait "$server" || true' EXIT

until curl --silent --fail "http://127.0.0.1:$port/health"; do
  kill -0 "$server"
  sleep 1
done

curl --silent "http://127.0.0.1:$port/v1/completions" \
  --header "Content-Type: application/json" \
  --data "{\"model\": \"$model\", \"prompt\": \"def main():\", \"max_tokens\": 48, \"temperature\": 0}"
echo
curl --silent "http://127.0.0.1:$port/metrics" | grep '^vllm:accel_'
