#!/usr/bin/env bash
# A real SLURM on this machine for the tests: a slurmctld and four slurmd, as nodes n1 and n2 of the partition main, and
# n3 and n4 of the partition failing, which tests kill. Each has 16 GPUs that are none.
# Nothing outside its folder is touched, but for the packages: another SLURM or munge goes on undisturbed.
#
#     tests/slurm/setup_cluster.sh            installs what is missing (Debian, Ubuntu: as root), configures, starts
#     tests/slurm/setup_cluster.sh stop       ends all jobs and daemons and removes the folder
#
# Then: pytest -m slurm, or by hand: export SLURM_CONF=$HARNESS_SLURM_DIR/slurm.conf; sinfo
set -euo pipefail

: "${HARNESS_SLURM_DIR:=/tmp/harness-slurm-$(id -u)}"
dir=$HARNESS_SLURM_DIR
export SLURM_CONF=$dir/slurm.conf
WAIT_SECONDS=30
NODES=(n1 n2 n3 n4)

wait_until() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@" > /dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.2
    done
}

install_packages() {
    local missing=()
    command -v slurmctld > /dev/null && command -v slurmd > /dev/null || missing+=(slurm-wlm)
    command -v munged > /dev/null || missing+=(munge)
    ((${#missing[@]})) || return 0
    if ! command -v apt-get > /dev/null || [[ $(id -u) != 0 ]]; then
        echo "setup_cluster.sh: install ${missing[*]} first (as root: apt-get install ${missing[*]})." >&2
        exit 2
    fi
    apt-get update -qq
    # Without policy the packages would start daemons of their own.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qq -y --no-install-recommends "${missing[@]}" > /dev/null
}

as_munge() { # munged refuses to be root
    if [[ $(id -u) == 0 ]]; then setpriv --reuid=munge --regid=munge --clear-groups "$@"; else "$@"; fi
}

configure() {
    mkdir -p "$dir"/{log,state,munge}
    chmod 755 "$dir" "$dir/munge"
    mkdir "${NODES[@]/#/$dir/spool-}"
    head -c 1024 /dev/urandom > "$dir/munge/key"
    chmod 600 "$dir/munge/key"
    [[ $(id -u) != 0 ]] || chown -R munge: "$dir/munge"
    # cred_expire: a requeued job waits that long, 120 seconds by default. SlurmdTimeout: so long a node may be silent.
    cat > "$SLURM_CONF" <<EOF
ClusterName=harness
SlurmctldHost=localhost
SlurmctldPort=26817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=10
KillWait=15
MinJobAge=600
JobRequeue=1
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdSpoolDir=$dir/spool-%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdParameters=config_overrides
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,defer_batch
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=failing Nodes=n3,n4 MaxTime=INFINITE State=UP
EOF
    local i
    for i in "${!NODES[@]}"; do
        echo "NodeName=${NODES[i]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((27001 + i)) CPUs=512" \
            "RealMemory=4000 Gres=gpu:16 State=UNKNOWN" >> "$SLURM_CONF"
    done
    touch "$dir"/gpu{0..15} # what stands for a device must be there
    echo "Name=gpu File=$dir/gpu[0-15]" > "$dir/gres.conf"
}

start() {
    if [[ -d $dir ]]; then
        echo "setup_cluster.sh: $dir exists already: one is running, or was not stopped; $0 stop" >&2
        exit 2
    fi
    install_packages
    configure
    as_munge munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    wait_until "$WAIT_SECONDS" test -S "$dir/munge/socket"
    slurmctld
    local node
    for node in "${NODES[@]}"; do start_node "$node"; done
    if ! wait_until "$WAIT_SECONDS" all_are_idle; then
        tail -n 20 "$dir"/log/*.log >&2
        echo "setup_cluster.sh: the nodes did not come up." >&2
        exit 1
    fi
    sinfo --Node
}

start_node() { # NAME
    slurmd -N "$1"
}

all_are_idle() {
    [[ $(sinfo --noheader --Node --states=idle | wc -l) == "${#NODES[@]}" ]]
}

stop() {
    [[ -d $dir ]] || return 0
    scancel --user="$(id -un)" --signal=KILL --full > /dev/null 2>&1 || true
    scancel --user="$(id -un)" > /dev/null 2>&1 || true
    wait_until 10 no_jobs || true
    local pidfile pids=()
    for pidfile in "$dir"/slurmctld.pid "$dir"/slurmd-n?.pid "$dir"/munge/pid; do
        [[ ! -s $pidfile ]] || pids+=("$(< "$pidfile")")
    done
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait_until 10 none_attempts "${pids[@]}" || kill -KILL "${pids[@]}" 2> /dev/null || true
    rm -rf "$dir"
}

no_jobs() {
    [[ -z $(squeue --noheader) ]]
}

none_attempts() { # PIDS...
    local pid
    for pid in "$@"; do if kill -0 "$pid" 2> /dev/null; then return 1; fi; done
}

case ${1:-start} in
    start) start ;;
    stop) stop ;;
    node) start_node "$2" ;; # start a slurmd again that a test has killed
    *)
        echo "usage: $0 [start|stop|node NAME]" >&2
        exit 2
        ;;
esac
