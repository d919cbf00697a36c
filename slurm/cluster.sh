# What the jobs in this folder share. They source it; it is no script of its own.
# shellcheck shell=bash

# ---- Adapt to your cluster ------------------------------------------------------------------------------------------
# Partition, account, time and GPUs are options of sbatch: the #SBATCH lines on top of each script, the command line, or
# SBATCH_PARTITION, SBATCH_ACCOUNT ... in your shell. What is written ${NAME:=value} can be set before sbatch.

# Software. An environment that was active when sbatch was typed is active in the job as well.
# module purge && module load cuda/12.8
# source "$HOME/venv/bin/activate"

# A container: options of srun (pyxis), or a command before the launcher (apptainer).
SRUN_OPTIONS=() # (--container-image=nvcr.io#nvidia/pytorch:25.09-py3 --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
WITHIN=()       # (apptainer exec --nv --bind "$PWD" "$HOME/pytorch.sif")

# Preempted jobs put themselves back into the queue, so often at most (a node failure counts too).
: "${MAX_REQUEUES:=100}"

# Exported to the training, here or by you:
export PYTHONUNBUFFERED=1 # the output of a killed job is whole
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:=false}"
# HF_HOME, WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE, HF_TOKEN ...: as they are in your shell. For nodes without internet:
# export WANDB_MODE=offline HF_HUB_OFFLINE=1
# OMP_NUM_THREADS: the cores of a node / its processes, unless it is set. The last bits of a number hang on it.
# Compiled kernels go to a disk of the node: many ranks write many small files there.
: "${NODE_CACHE:=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/harness-$(id -un)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:=$NODE_CACHE/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:=$NODE_CACHE/inductor}"
# Networks: which interface, if the automatic choice is wrong.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG="${NCCL_DEBUG:=WARN}"
# ---------------------------------------------------------------------------------------------------------------------

# The launchers of torch would hand SIGTERM on and kill after 30 seconds. SLURM sends it to the ranks itself, and they
# save for as long as the grace time is.
export PET_SIGNALS_TO_HANDLE=SIGINT
# Seconds between the death of a process and the end of the job, for rank zero to say what happened.
: "${SECONDS_TO_CLOSE:=15}"

fail() {
    echo "$(basename -- "${SLURM_JOB_NAME:-job}"): $*" >&2
    exit 2
}

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
JOB=${JOB:-$SLURM_JOB_ID}

find_output_dir() { # ARGUMENTS...: sets OUTPUT_DIR: that of --output_dir, or the one that the harness takes in a job
    local previous="" argument
    OUTPUT_DIR=""
    for argument in "$@"; do
        [[ $previous != --output_dir ]] || OUTPUT_DIR=$argument
        [[ $argument != --output_dir=* ]] || OUTPUT_DIR=${argument#*=}
        previous=$argument
    done
    OUTPUT_DIR=${OUTPUT_DIR/#\~/$HOME}
}

# GPUs of a node, or 1: sets PROCESSES_PER_NODE and OMP_NUM_THREADS. Unequal nodes are refused.
plan_processes() {
    local nodes gpus cpus
    # shellcheck disable=SC2016 # expanded on the nodes
    nodes=$(srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
        bash -c 'echo "${SLURM_GPUS_ON_NODE:-0} GPUs, $SLURM_CPUS_ON_NODE CPUs"' | sort | uniq -c)
    [[ $(wc -l <<< "$nodes") == 1 ]] || fail "the nodes are unequal, ask for the same of each, for example by" \
        "--gpus-per-node and --cpus-per-task. There are:"$'\n'"$nodes"
    read -r _ gpus _ cpus _ <<< "$nodes"
    : "${PROCESSES_PER_NODE:=$((gpus > 0 ? gpus : 1))}"
    : "${OMP_NUM_THREADS:=$((cpus > PROCESSES_PER_NODE ? cpus / PROCESSES_PER_NODE : 1))}"
    export OMP_NUM_THREADS
}

# The address that SLURM knows of the first node (its name need not resolve), and a port that is free there: the batch
# script runs on that node.
find_rendezvous() {
    ADDRESS=$(scontrol show node "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" |
        sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    PORT=$((10000 + SLURM_JOB_ID % 20000))
    while (: < "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do PORT=$((PORT + 1)); done
}

# SLURM 22.05 and later: a step has one core unless it is said again.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"

# What each node runs, once the launcher's own signals are set: SLURM's signals are for the ranks, and the launcher would
# die of them. A launcher that failed stays a moment, as the first to end ends all others (--kill-on-bad-exit).
# shellcheck disable=SC2016 # expanded on the nodes
IGNORING_SIGNALS='trap "" USR1 TERM; exec "$@"'
# shellcheck disable=SC2016
ON_NODE='accelerate launch --machine_rank "$SLURM_NODEID" "$@" && exit
    status=$?
    [[ -e $MARKER ]] || sleep "$SECONDS_TO_CLOSE"
    exit "$status"'

# Train on all nodes of the job, one launcher a node; then requeue if the training says so, or end with its exit code.
# If a node fails, SLURM itself starts the job again (--requeue).
train() { # ARGUMENTS of train.py...
    plan_processes
    find_rendezvous
    local processes=$((PROCESSES_PER_NODE * SLURM_JOB_NUM_NODES)) default=ddp status=0
    ((processes > 1)) || default=single
    : "${LAUNCH_CONFIG:=$HARNESS_DIR/launch_configs/$default.yaml}"
    [[ -f $LAUNCH_CONFIG ]] || fail "LAUNCH_CONFIG=$LAUNCH_CONFIG: no such file."
    find_output_dir "$@"
    if [[ -z $OUTPUT_DIR ]]; then
        OUTPUT_DIR=runs/job-$JOB
        set -- "$@" --output_dir "$OUTPUT_DIR"
    fi
    export MARKER=$OUTPUT_DIR/preempted SECONDS_TO_CLOSE
    rm -f -- "$MARKER"
    echo "Job $JOB, restart ${SLURM_RESTART_COUNT:-0}: $processes processes on $SLURM_JOB_NODELIST by $LAUNCH_CONFIG"

    srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
        bash -c "$IGNORING_SIGNALS" - "${WITHIN[@]}" bash -c "$ON_NODE" - \
        --config_file "$LAUNCH_CONFIG" --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$processes" \
        --main_process_ip "$ADDRESS" --main_process_port "$PORT" --deepspeed_multinode_launcher standard \
        "$HARNESS_DIR/harness/train.py" "$@" || status=$?

    [[ -e $MARKER ]] || exit "$status"
    requeue "$status" "--output_dir $OUTPUT_DIR --resume_from_checkpoint auto"
}

# Be a worker of a study: the trials are trained one after the other, on all GPUs of the node. A worker that was told to
# stop ends with 85 once its trial is saved; another one, or its own next attempt, goes on with that.
sweep() { # SWEEP.yaml and OPTIONS of harness sweep, -- FLAGS of all trials...
    plan_processes
    export PYTHONPATH="$HARNESS_DIR${PYTHONPATH:+:$PYTHONPATH}"
    local status=0 launcher=()
    if ((PROCESSES_PER_NODE > 1)); then
        find_rendezvous
        : "${LAUNCH_CONFIG:=$HARNESS_DIR/launch_configs/ddp.yaml}"
        launcher=(--launcher "accelerate launch --config_file '$LAUNCH_CONFIG' --num_processes $PROCESSES_PER_NODE --main_process_port $PORT")
    fi
    echo "Job $JOB, restart ${SLURM_RESTART_COUNT:-0}: a worker on $SLURM_JOB_NODELIST, $PROCESSES_PER_NODE processes a trial"
    # shellcheck disable=SC2016 # expanded on the node
    srun --ntasks-per-node=1 --ntasks=1 --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
        bash -c "$IGNORING_SIGNALS" - "${WITHIN[@]}" python -m harness sweep "$1" "${launcher[@]}" "${@:2}" || status=$?
    ((status == 85)) || exit "$status"
    requeue "$status" "the same command"
}

requeue() { # EXIT_CODE HOW_TO_GO_ON: put the job back into the queue, and end
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
        fail "preempted, and already requeued ${SLURM_RESTART_COUNT:-0} times (MAX_REQUEUES): not once more. Go on by" \
            "submitting it again with $2."
    fi
    echo "Job $JOB was preempted after a save: requeued."
    scontrol requeue "$JOB"
    exit "$1"
}
