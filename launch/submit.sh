#!/bin/bash
# launch/submit.sh [--chain N] LAUNCH_FILE [sbatch options]: freezes code and config now, checks everything that can be
# checked without a node, then submits (N jobs that follow each other by --dependency=singleton).
. "$(dirname "$0")/common.sh" || exit 1
TORL_HOME=${TORL_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
chain=1
if [ "${1:-}" = --chain ]; then
  chain=${2:-}
  case "$chain" in '' | *[!0-9]* | 0) torl_die "--chain ${chain:-(nothing)}: expected a number of jobs, at least 1" ;; esac
  shift 2
fi
[ -r "${1:-}" ] || torl_die "usage: launch/submit.sh [--chain N] LAUNCH_FILE [sbatch options]; ${1:-(nothing)} is not readable"
script=$1
shift
command -v sbatch >/dev/null || torl_die "sbatch is not on PATH; on one machine use launch/local.sh"
read -r conf program < <(sed -n 's/^torl_job //p' "$script")
[ -n "$conf" ] || torl_die "$script is not a launch file: it has no line \`torl_job CONF\`"
torl_environment "$conf" "$program"
answer=$(sbatch --test-only "$@" "$script" 2>&1) || torl_die "sbatch refuses $script $*: ${answer##*: }"
torl_freeze "submitted.$$"
nodes=$(sed -n 's/^.* on nodes* //p' <<<"$answer" | head -n 1)
torl_say "sbatch accepts it${nodes:+ (would start on $nodes)}; code and config are frozen in $JOB_DIR"
torl_planner || torl_die "torl plan refuses this run, see above"
for _ in $(seq "$chain"); do TORL_FROZEN=$JOB_DIR TORL_HOME=$TORL_HOME sbatch "$@" "$script" || exit 1; done
