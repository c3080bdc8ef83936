#!/usr/bin/env bash
# A SLURM of one node on this machine, without accounting, for tests: its own munge key, sockets, ports and folder.
#
#   tests/launch/slurm_here.sh install      with apt-get, as root
#   tests/launch/slurm_here.sh start DIR    then: export SLURM_CONF=DIR/slurm.conf
#   tests/launch/slurm_here.sh stop DIR
set -euo pipefail

programs=(munged slurmctld slurmd sbatch srun scancel scontrol squeue)
packages=(munge slurmctld slurmd slurm-client)

missing() {
    for program in "${programs[@]}"; do
        PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || echo "$program"
    done
}

install() {
    [[ $(missing) ]] || return 0
    if ((EUID != 0)) || ! command -v apt-get > /dev/null; then
        echo "slurm_here.sh: $(missing | xargs) missing; needs root and apt-get to install ${packages[*]}" >&2
        return 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" > /dev/null
}

start() {
    local dir host
    mkdir -p "$1/state" "$1/spool" "$1/munge"
    dir=$(cd "$1" && pwd)
    host=$(hostname -s)
    chmod 755 "$dir" "$dir/munge"
    (umask 077 && head -c 1024 /dev/urandom > "$dir/munge/key")
    # --force: the folder may lie under one that others may write to, as /tmp
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    cat > "$dir/slurm.conf" << END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket
SlurmctldPort=$((20000 + RANDOM % 5000))
SlurmdPort=$((25000 + RANDOM % 5000))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# no cgroups, no MPI: a container has neither
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# as many places as the tests want, however many cores there are
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd -N "$host"
    for _ in {1..100}; do
        if [[ $(sinfo --noheader --format=%t 2> /dev/null) == idle ]]; then
            return 0
        fi
        sleep 0.2
    done
    echo "slurm_here.sh: the node is not idle after 20 s; see $dir/slurmctld.log and $dir/slurmd.log" >&2
    return 1
}

stop() {
    local file
    export SLURM_CONF=$1/slurm.conf
    scancel --quiet --full --signal=KILL --user="$(id -un)" || true
    scancel --quiet --user="$(id -un)" || true
    for _ in {1..50}; do
        [[ $(squeue --noheader 2> /dev/null) ]] || break
        sleep 0.2
    done
    for file in slurmd.pid slurmctld.pid munge/pid; do
        if [[ -s $1/$file ]]; then
            kill "$(cat "$1/$file")" || true
        fi
    done
}

PATH=$PATH:/usr/sbin
case ${1:-} in
    install) install ;;
    start) start "$2" ;;
    stop) stop "$2" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" ;;
esac
