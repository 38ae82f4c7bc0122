# Shared by all launch files: one allocation, no Ray. Sourced, never run.
#
#   prepare (config, run folder, copy of the code)  ->  plan  ->  preflight on every node
#     ->  side-cars (a sandbox and servers on each node, --overlap steps)  ->  ranks  ->  done | requeue | again | stop
#
# From the environment (launch/site.env is read first, when it is there):
#   TORL_HOME       checkout on a file system that all nodes share    (default: where sbatch was called)
#   TORL_CONF       config                                            (default: the launch file's own)
#   TORL_OVERRIDES  a.b=value ..., separated by spaces
#   TORL_IMAGE      container image; unset = run bare from TORL_PYTHON
#   TORL_CONTAINER  pyxis | apptainer                                 (default: what this cluster has)
#   TORL_MOUNTS     host:container,... on top of TORL_HOME and the run folder
#   TORL_PYTHON     python with torl in it                            (default: TORL_HOME/.venv/bin/python, `python` in an image)
#   TORL_REQUIRED   names of variables this site wants set, e.g. "SBATCH_ACCOUNT SBATCH_PARTITION"
#   TORL_MAX_RESTARTS  times the ranks are started again in one allocation after one was killed (default 3)
#   TORL_CACHE      folder for kernels that are compiled when first used; all nodes and jobs share it (default: .cache in runs_dir)
#   TORL_IFNAME     network interface whose address the other nodes are told, for gloo and NCCL's bootstrap too
#                   (default: the one through which a node reaches the others)
#   TORL_SECRET     what servers and sandboxes ask of their callers   (default: made for the job)
#   account, partition, reservation, qos: sbatch's own SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_RESERVATION, SBATCH_QOS
#
# Exit codes of the job (process/exit_codes.py): 0 done; 1 an error in one line (nothing to retry); 85 stopped after a
# checkpoint and could not be requeued by itself: submit again; 86 the ranks were killed more often than TORL_MAX_RESTARTS allows.
#
# A launch file ends with `torl_job CONF [PROGRAM]`. PROGRAM: rank (the default, trains), eval or rollout.

set -uo pipefail

torl_say() { echo "torl: $*"; }
torl_die() { echo "torl: error: $*" >&2; exit 1; }

# ---------------------------------------------------------------------------------------------- what must be there

torl_environment() { # DEFAULT_CONF PROGRAM
  PROGRAM=${2:-rank}
  TORL_HOME=${TORL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
  [ -d "$TORL_HOME" ] || torl_die "TORL_HOME = $TORL_HOME is no folder; set it to the checkout, on a file system all nodes share"
  TORL_HOME=$(cd "$TORL_HOME" && pwd)
  [ -d "$TORL_HOME/torl_mega" ] || torl_die "TORL_HOME = $TORL_HOME holds no torl_mega; submit from the checkout or set TORL_HOME"
  # shellcheck disable=SC1091
  if [ -f "$TORL_HOME/launch/site.env" ]; then . "$TORL_HOME/launch/site.env"; fi
  local name
  for name in ${TORL_REQUIRED:-}; do
    case "$name" in SBATCH_ACCOUNT) [ -z "${SLURM_JOB_ACCOUNT:-}" ] || continue ;; SBATCH_PARTITION) [ -z "${SLURM_JOB_PARTITION:-}" ] || continue ;; esac
    [ -n "${!name:-}" ] || torl_die "$name is not set; this site needs it (TORL_REQUIRED in launch/site.env)"
  done
  TORL_CONF=${TORL_CONF:-$1}
  case "$TORL_CONF" in /*) ;; *) TORL_CONF=$TORL_HOME/$TORL_CONF ;; esac
  [ -r "$TORL_CONF" ] || torl_die "TORL_CONF = $TORL_CONF is not readable"
  case "${TORL_MAX_RESTARTS:=3}" in *[!0-9]*) torl_die "TORL_MAX_RESTARTS = $TORL_MAX_RESTARTS is not a number" ;; esac
  torl_container
  export TORL_HOME TORL_CONF
  cd "$TORL_HOME" || torl_die "cannot enter TORL_HOME = $TORL_HOME"
}

# Sets IN_SRUN (arguments of srun) and IN_TASK (words before the command) for the chosen container, or none.
torl_container() {
  IN_SRUN=() IN_TASK=()
  if [ -z "${TORL_IMAGE:-}" ]; then
    [ -z "${TORL_CONTAINER:-}" ] || torl_die "TORL_CONTAINER = $TORL_CONTAINER needs TORL_IMAGE; set it to the image, or unset both"
    PYTHON=${TORL_PYTHON:-$TORL_HOME/.venv/bin/python}
    [ -x "$PYTHON" ] || torl_die "$PYTHON is not there; run \`make install\`, or set TORL_PYTHON, or TORL_IMAGE for a container"
    return
  fi
  PYTHON=${TORL_PYTHON:-python}
  if [ -z "${TORL_CONTAINER:-}" ]; then
    if srun --help 2>/dev/null | grep -q -- --container-image; then TORL_CONTAINER=pyxis
    elif command -v apptainer >/dev/null; then TORL_CONTAINER=apptainer
    else torl_die "TORL_IMAGE = $TORL_IMAGE, but this cluster has neither pyxis nor apptainer; unset it to run bare"; fi
  fi
  case "$TORL_IMAGE" in
    /* | ./*) [ -r "$TORL_IMAGE" ] || torl_die "TORL_IMAGE = $TORL_IMAGE is not readable; build it from the Dockerfile, see docs/cluster.md" ;;
  esac
  case "$TORL_HOME" in *[[:space:],:]*) torl_die "TORL_HOME = $TORL_HOME has a space, comma or colon, which no container can mount; link to the checkout from another place" ;; esac
  local mounts=$TORL_HOME:$TORL_HOME${TORL_MOUNTS:+,$TORL_MOUNTS} mount
  while IFS= read -r -d , mount; do
    [ -e "${mount%%:*}" ] || torl_die "TORL_MOUNTS names ${mount%%:*}, which is not there"
  done <<<"${TORL_MOUNTS:+$TORL_MOUNTS,}"
  case "$TORL_CONTAINER" in
    pyxis) IN_SRUN=(--container-image="$TORL_IMAGE" --container-mounts="$mounts" --container-workdir="$TORL_HOME") ;;
    apptainer) IN_TASK=(apptainer exec --nv --bind "$mounts" --pwd "$TORL_HOME" "$TORL_IMAGE") ;;
    *) torl_die "TORL_CONTAINER = $TORL_CONTAINER is not known; use pyxis or apptainer, or unset TORL_IMAGE to run bare" ;;
  esac
}

# Mounts the folder of all runs too, where it is not below TORL_HOME.
torl_mount_runs() { # FOLDER
  case "$1" in "$TORL_HOME" | "$TORL_HOME"/*) return ;; esac
  mkdir -p "$1" || torl_die "runs_dir = $1 cannot be made"
  TORL_MOUNTS=${TORL_MOUNTS:+$TORL_MOUNTS,}$1:$1
  torl_container
}

# ------------------------------------------------------------------------------------------ one frozen run per job

# Copies code and config into the run folder, once per job: a requeued job, and one submitted with launch/submit.sh,
# runs what it was submitted with. Sets JOB_DIR.
torl_freeze() { # JOB
  local link=$TORL_HOME/runs/.jobs/$1 out
  local reuse=${TORL_FROZEN:-}
  if [ -n "$reuse" ]; then link=$reuse; fi
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then reuse=yes; fi
  if [ -z "$reuse" ] || [ ! -e "$link/config.yaml" ]; then
    if [ -n "${TORL_IMAGE:-}" ]; then
      # shellcheck disable=SC2086
      out=$(torl_once "$PYTHON" -m torl_mega.launch.task runs_dir "$TORL_CONF" ${TORL_OVERRIDES:-}) || exit 1
      torl_mount_runs "$out"
    fi
    # shellcheck disable=SC2086
    out=$(torl_once "$PYTHON" -m torl_mega.launch.task prepare "$PROGRAM" "$TORL_CONF" ${TORL_OVERRIDES:-}) || exit 1
    JOB_DIR=$(sed -n 1p <<<"$out")/jobs/$1
    mkdir -p "$JOB_DIR" "$TORL_HOME/runs/.jobs" || torl_die "cannot write $JOB_DIR"
    rm -rf "$JOB_DIR/torl_mega" "$JOB_DIR/launch" # of a job with the same number on another cluster
    cp -r "$TORL_HOME/torl_mega" "$TORL_HOME/launch" "$JOB_DIR/" || torl_die "cannot copy the code to $JOB_DIR"
    mv "$(sed -n 2p <<<"$out")" "$JOB_DIR/config.yaml"
    ln -sfn "$JOB_DIR" "$TORL_HOME/runs/.jobs/$1"
  else
    JOB_DIR=$(cd "$link" && pwd -P)
    if [ -n "${TORL_IMAGE:-}" ]; then torl_mount_runs "$(cd "$JOB_DIR/../../.." && pwd)"; fi
  fi
  export PYTHONPATH=$JOB_DIR PYTHONSAFEPATH=1 # the copy, not the checkout
  CONF=$JOB_DIR/config.yaml
}

# A short command on the batch node, in the container.
torl_once() {
  if [ -n "${TORL_IMAGE:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    srun --overlap --nodes=1 --ntasks=1 --gres=none --mem=0 "${IN_SRUN[@]}" "${IN_TASK[@]}" "$@"
  else
    "${IN_TASK[@]}" "$@"
  fi
}

# -------------------------------------------------------------------------------------------------- plan, preflight

torl_planner() { # arguments... : the plan of a training; a run without a trainer is placed only
  local module=torl_mega.launch.place
  [ "$PROGRAM" != rank ] || module=torl_mega.launch.plan
  torl_once "$PYTHON" -m $module "$CONF" "$@"
}

torl_plan() { # sets PLACEMENT and its counts
  local hosts cores
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,) || torl_die "scontrol cannot name the nodes $SLURM_JOB_NODELIST"
  cores=${SLURM_CPUS_ON_NODE:-0}
  GPUS=${SLURM_GPUS_ON_NODE:-}
  [ -n "$GPUS" ] || torl_die "no GPUs in this allocation; ask for --gpus-per-node"
  PLACEMENT=$LOGS/placement.json
  torl_planner --nodes "$SLURM_JOB_NUM_NODES" --gpus "$GPUS" --hosts "$hosts" --cores "$cores" \
    --base-port $((20000 + SLURM_JOB_ID % 12 * 1000)) --out "$PLACEMENT" >"$LOGS/plan.txt" 2>&1
  if [ ! -s "$PLACEMENT" ]; then cat "$LOGS/plan.txt" >&2; torl_die "torl plan refuses this run on $SLURM_JOB_NUM_NODES x $GPUS GPUs, see above"; fi
  read -r RANKS RANK_NODES SERVERS SERVER_NODES SANDBOXES < <(torl_once "$PYTHON" -c '
import json, sys
p = json.load(open(sys.argv[1]))
print(p["ranks_per_node"], p["num_rank_nodes"], p["servers_per_node"], p["num_server_nodes"], sum(q["role"] == "sandbox" for q in p["processes"]))' "$PLACEMENT")
  [ -n "${SANDBOXES:-}" ] || torl_die "$PLACEMENT is not readable"
}

torl_preflight() {
  mkdir -p "$LOGS/preflight"
  torl_step "$SLURM_JOB_NUM_NODES" 1 --gres=gpu:"$GPUS" --output="$LOGS/preflight/%n.log" -- \
    "$PYTHON" -m torl_mega.launch.doctor "$CONF" --placement "$PLACEMENT" --report "$LOGS/preflight" || true
  torl_once "$PYTHON" -m torl_mega.launch.doctor --collect "$LOGS/preflight" --placement "$PLACEMENT" || torl_die "preflight found the faults above; nothing was started"
}

# ------------------------------------------------------------------------------------------------------ the steps

# An overlapping step of NODES x TASKS tasks: every step sees all cores of its nodes, roles pin themselves to theirs.
torl_step() { # NODES TASKS srun-arguments... -- command...
  local nodes=$1 tasks=$2 args=()
  shift 2
  while [ "$1" != -- ]; do args+=("$1"); shift; done
  shift
  srun --overlap --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task=$((${SLURM_CPUS_ON_NODE:-1} / tasks > 0 ? ${SLURM_CPUS_ON_NODE:-1} / tasks : 1)) \
    --cpu-bind=none --mem=0 --wait=0 --kill-on-bad-exit=0 --export=ALL "${IN_SRUN[@]}" "${args[@]}" "${IN_TASK[@]}" "$@"
}

torl_tasks() { # ROLE NODES TASKS srun-arguments... : a step in whose tasks stands launch/task.py
  local role=$1 nodes=$2 tasks=$3
  shift 3
  torl_step "$nodes" "$tasks" --job-name="$role" "$@" -- "$PYTHON" -m torl_mega.launch.task "$role" "$PLACEMENT" "$CONF"
}

torl_sidecars() { # sets SIDECARS to the srun pids; such a step ends as a whole when one of its tasks is killed
  local last=$SLURM_JOB_NUM_NODES
  SIDECARS=()
  if [ "$SANDBOXES" -gt 0 ]; then
    torl_tasks sandbox "$last" 1 --gres=none --kill-on-bad-exit=1 --output="$LOGS/%N.sandbox_%n.log" &
    SIDECARS+=($!)
  fi
  if [ "$SERVERS" -gt 0 ]; then
    torl_tasks server "$SERVER_NODES" "$SERVERS" --gres=gpu:"$GPUS" --relative=$((last - SERVER_NODES)) --kill-on-bad-exit=1 \
      --output="$LOGS/%N.server_%t.log" &
    SIDECARS+=($!)
  fi
}

torl_stop_sidecars() { # their tasks look for the note; what is left after 20 s goes the hard way
  local pid i
  [ ${#SIDECARS[@]} -gt 0 ] || return 0
  touch "$TORL_STATUS/end"
  for i in $(seq 40); do
    kill -0 "${SIDECARS[@]}" 2>/dev/null || break
    sleep 0.5
  done
  for pid in "${SIDECARS[@]}"; do kill -KILL "$pid" 2>/dev/null; done
  wait "${SIDECARS[@]}" 2>/dev/null
  SIDECARS=()
}

torl_ranks() { # returns the step's exit code: the highest of all ranks
  torl_tasks "$PROGRAM" "$RANK_NODES" "$RANKS" --gres=gpu:"$GPUS" --output="$LOGS/%N.rank_%t.log" &
  local pid=$! car
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1 & wait $! # which a trapped signal interrupts
    for car in ${SIDECARS[@]+"${SIDECARS[@]}"}; do
      if ! kill -0 "$car" 2>/dev/null && [ ! -e "$TORL_STATUS/stop" ]; then touch "$TORL_STATUS/lost"; fi
    done
  done
  wait "$pid"
}

# ------------------------------------------------------------------------------------------------------- one job

torl_stop() { # the ranks' tasks look for this file: only the rank programs are told, not every process of the job
  if [ -n "${TORL_STATUS:-}" ]; then touch "$TORL_STATUS/stop"; fi
}

torl_attempt() { # one start of side-cars and ranks; returns the ranks' exit code
  torl_sidecars
  torl_ranks
  local code=$?
  torl_stop_sidecars
  return "$code"
}

# Why the ranks ended: what a side-car could not do, or else what the ranks said.
torl_last_words() {
  local line
  line=$(cat "$TORL_STATUS/failed" 2>/dev/null || grep -h "torl: error:" "$TORL_STATUS"/rank_* "$LOGS"/*.rank_*.log 2>/dev/null | sort -u | head -n 3)
  if [ -n "$line" ]; then echo "$line" >&2; else echo "torl: see the logs in $LOGS" >&2; fi
}

torl_requeue() {
  local state
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n 's/^JobState=//p')
  if [ "$state" != RUNNING ]; then # cancelled, or preempted and already on its way back into the queue
    torl_say "stopped after a checkpoint; the job is $state"
    exit 85
  fi
  torl_say "stopped after a checkpoint; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && { sleep 60 & wait $!; exit 85; }
  torl_say "this cluster does not requeue; submit the same command again, it goes on from the last checkpoint"
  exit 85
}

torl_done() {
  if [ "$PROGRAM" = eval ]; then cat "$JOB_DIR/../../eval/step_00000.md"; fi
  torl_say "done"
}

torl_job() { # DEFAULT_CONF [PROGRAM]
  [ -n "${SLURM_JOB_ID:-}" ] || torl_die "this is a batch script: sbatch $0 (on one machine: launch/local.sh)"
  unset SLURM_EXPORT_ENV # set by sbatch --export=NONE; srun would start tasks without PATH
  unset SLURM_GPUS_PER_NODE SLURM_GPUS SLURM_NTASKS_PER_NODE # srun would add them to what each step asks for
  trap torl_stop TERM USR1
  torl_environment "$@"
  torl_freeze "$SLURM_JOB_ID"
  if [ -n "${TORL_IFNAME:-}" ]; then export TORL_IFNAME; fi
  export TORL_SECRET=${TORL_SECRET:-$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')} # servers and sandboxes ask for it
  local start=${SLURM_RESTART_COUNT:-0} attempt=0 code
  while :; do
    LOGS=$JOB_DIR/logs/$start.$attempt
    export TORL_STATUS=$LOGS/status # from here on a signal leaves its note, also while the plan is made
    rm -rf "$TORL_STATUS"
    mkdir -p "$TORL_STATUS" || torl_die "cannot write $LOGS"
    if [ "$attempt" = 0 ]; then
      torl_plan
      torl_preflight
    else
      cp "$JOB_DIR/logs/$start.0/placement.json" "$LOGS/" && PLACEMENT=$LOGS/placement.json
    fi
    if [ -e "$TORL_STATUS/stop" ]; then torl_requeue; fi
    torl_say "start $start, attempt $attempt on $SLURM_JOB_NODELIST: $((RANKS * RANK_NODES)) ranks, $((SERVERS * SERVER_NODES)) servers; logs in $LOGS"
    torl_attempt
    code=$?
    case $code in
      0) torl_done; exit 0 ;;
      85) torl_requeue ;;
    esac
    if [ -e "$TORL_STATUS/stop" ]; then torl_requeue; fi
    torl_last_words
    if [ "$code" -lt 128 ]; then torl_die "the ranks ended with code $code; logs in $LOGS"; fi
    attempt=$((attempt + 1))
    if [ "$attempt" -gt "$TORL_MAX_RESTARTS" ]; then
      echo "torl: error: ranks were killed $attempt times (last code $code); logs in $JOB_DIR/logs" >&2
      exit 86
    fi
    torl_say "a rank was killed (code $code); the ranks start again from the last checkpoint"
  done
}
