#!/bin/bash
# One machine without Slurm: launch/local.sh [CONF [a.b=value ...]]. The same checks, then `torl train`.
. "$(dirname "$0")/common.sh" || exit 1
TORL_HOME=${TORL_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
TORL_CONF=${1:-${TORL_CONF:-conf/quickstart.yaml}}
shift || true
torl_environment "$TORL_CONF"
# shellcheck disable=SC2206
overrides=(${TORL_OVERRIDES:-} "$@")
torl_once "$PYTHON" -m torl_mega.launch.doctor "$TORL_CONF" "${overrides[@]}" || torl_die "the checks above failed; nothing was started"
exec "${IN_TASK[@]}" "$PYTHON" -m torl_mega.cli train "$TORL_CONF" "${overrides[@]}"
