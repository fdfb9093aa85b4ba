#!/usr/bin/env bash
# A real SLURM of several nodes on one Debian or Ubuntu machine, to try a launch before going to a cluster:
#   slurm/local_cluster.sh up|down|status|env|node-down NODE|node-up NODE
# Every node is a slurmd on a port of its own; nothing is kept between two "up". slurm/README.md says more.
set -euo pipefail

DIR=${LLAMAGEN_SLURM_DIR:-/tmp/llamagen-slurm} # keep it short: a unix socket's path has at most 107 characters
NODES=${LLAMAGEN_SLURM_NODES:-4}
CPUS=${LLAMAGEN_SLURM_CPUS:-8} # per node, believed whatever the machine has
GPUS=${LLAMAGEN_SLURM_GPUS:-4} # per node; they are copies of /dev/null, for CUDA_VISIBLE_DEVICES alone
MEMORY_MB=${LLAMAGEN_SLURM_MEMORY_MB:-8000}
PORT=${LLAMAGEN_SLURM_PORT:-16817} # slurmctld; node i listens on PORT + 10 + i
export SLURM_CONF=$DIR/slurm.conf

fail() {
  echo "local_cluster.sh: $*" >&2
  exit 2
}

check_machine() {
  local command missing=""
  for command in munged slurmctld slurmd sinfo sbatch srun; do
    command -v "$command" > /dev/null || missing="$missing $command"
  done
  [ -z "$missing" ] || fail "SLURM is not installed (no$missing); install it with: make slurm" \
    "(apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client)"
  [ "$(id -u)" = 0 ] || fail "SLURM's daemons, /etc/hosts and device nodes need root; run this as root (sudo)"
  [ "${#DIR}" -le 80 ] || fail "LLAMAGEN_SLURM_DIR=$DIR is too long for the path of a socket; choose a shorter one"
}

alive() { # PIDFILE: a zombie that nobody has collected yet is not alive
  local pid
  pid=$(cat "$1" 2> /dev/null) && [ -n "$pid" ] && [ -r "/proc/$pid/status" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status"
}

stop() { # PIDFILE [tenths of a second to wait before it is killed]
  local tenth
  if alive "$1"; then
    kill "$(cat "$1" 2> /dev/null)" 2> /dev/null || true
    for tenth in $(seq "${2:-50}"); do alive "$1" && sleep 0.1 || break; done
    if alive "$1"; then kill -9 "$(cat "$1" 2> /dev/null)" 2> /dev/null || true; fi
  fi
  rm -f "$1"
}

node_names() { seq -f 'n%.0f' "$NODES"; }

write_configuration() {
  cat > "$DIR/slurm.conf" << CONF
ClusterName=llamagen
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
# from the clock, so that a folder of an earlier cluster's job is never met again
FirstJobId=$(($(date +%s) % 1000000 + 1000))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again; SLURM's own default is two minutes
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdSpoolDir=$DIR/spool/%n
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
# neither systemd nor cgroups are needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
# quick decisions, and failures noticed quickly
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=10
BatchStartTimeout=10
KillWait=5
CompleteWait=0
MinJobAge=3600
OverTimeLimit=0
JobRequeue=1
ReturnToService=2
TreeWidth=64
# without accounting, as on some clusters: sacct says that it is disabled
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobs.txt
GresTypes=gpu
NodeName=n[1-$NODES] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((PORT + 11))-$((PORT + 10 + NODES))] CPUs=$CPUS RealMemory=$MEMORY_MB$( ((GPUS > 0)) && echo " Gres=gpu:$GPUS") State=UNKNOWN
# a job in "urgent" takes the nodes of jobs in "main": they get their --signal at once, 20 s later they are requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
CONF
  : > "$DIR/gres.conf"
  ((GPUS > 0)) || return 0
  local i # a count alone is reported as no GPU at all: it must be character devices
  mkdir -p "$DIR/dev"
  for i in $(seq 0 $((GPUS - 1))); do
    [ -c "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3 2> /dev/null ||
      fail "this machine allows no device nodes under $DIR; start without GPUs: LLAMAGEN_SLURM_GPUS=0 $0 up"
  done
  echo "NodeName=n[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" > "$DIR/gres.conf"
}

name_nodes() { # rank 0's node name becomes MASTER_ADDR, so the names must resolve
  local name address
  for name in $(node_names); do
    address=$(getent ahostsv4 "$name" | awk 'NR == 1 { print $1 }') || true
    [ -n "$address" ] || { echo "127.0.0.1 $name" >> /etc/hosts && continue; }
    [ "$address" = 127.0.0.1 ] || fail "the name $name is taken by $address on this network; remove it from /etc/hosts"
  done
}

ready() { [ "$(sinfo -h -N -p main -o '%T' 2> /dev/null | grep -cE '^(idle|mixed|allocated)$')" = "$NODES" ]; }

up() {
  check_machine
  if alive "$DIR/slurmctld.pid"; then
    echo "already up; clients need: export SLURM_CONF=$SLURM_CONF"
    return
  fi
  local port name
  for port in "$PORT" $(seq $((PORT + 11)) $((PORT + 10 + NODES))); do
    if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
      fail "port $port is in use; choose another with LLAMAGEN_SLURM_PORT ($PORT and the $((NODES + 10)) after it must be free)"
    fi
  done
  mkdir -p "$DIR/log" "$DIR/state" "$DIR/spool" && chmod 755 "$DIR"
  rm -rf "${DIR:?}/state"/* "${DIR:?}/spool"/* # a drained node or old job ids would come back
  for name in $(node_names); do mkdir -p "$DIR/spool/$name"; done
  name_nodes
  write_configuration
  if ! alive "$DIR/munged.pid"; then
    [ -s "$DIR/munge.key" ] || (umask 077 && head -c 128 /dev/urandom > "$DIR/munge.key")
    munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munged.pid" \
      --log-file="$DIR/log/munged.log" --seed-file="$DIR/munged.seed" 2>> "$DIR/log/munged.log"
  fi
  slurmctld -f "$SLURM_CONF"
  for name in $(node_names); do slurmd -f "$SLURM_CONF" -N "$name"; done
  local tenth
  for tenth in $(seq 300); do
    if ready; then
      echo "$NODES nodes of $CPUS CPUs and $GPUS (pretended) GPUs; clients need: export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.1
  done
  sinfo -N -l >&2 || true
  fail "the nodes are not ready after 30 s; the daemons' logs are in $DIR/log"
}

down() {
  [ -d "$DIR" ] || return 0
  local tenth name
  if alive "$DIR/slurmctld.pid"; then
    squeue -h -o %A 2> /dev/null | sort -u | xargs -r scancel 2> /dev/null || true
    for tenth in $(seq 80); do [ -n "$(squeue -h 2> /dev/null)" ] && sleep 0.1 || break; done
  fi
  stop "$DIR/slurmctld.pid" 10 # it may take long to end, and its state is thrown away
  for name in $(node_names); do
    stop "$DIR/slurmd.$name.pid"
    node_processes "$name" | xargs -r kill -9 2> /dev/null || true
  done
  stop "$DIR/munged.pid"
}

node_processes() { # NODE: the supervisors of its job steps first, then what they have started
  local pid parent environment
  for pid in $(cd /proc && echo [0-9]*); do
    environment=$'\n'$(cat "/proc/$pid/environ" 2> /dev/null | tr '\0' '\n')$'\n' || continue
    [[ $environment == *$'\n'"SLURMD_NODENAME=$1"$'\n'* && $environment == *$'\n'"SLURM_CONF=$SLURM_CONF"$'\n'* ]] || continue
    parent=$(awk '$1 == "PPid:" { print $2 }' "/proc/$pid/status" 2> /dev/null) || continue
    [ "$(cat "/proc/$parent/comm" 2> /dev/null)" != slurmstepd ] || echo "0 $parent"
    echo "1 $pid"
  done | sort -u | cut -d ' ' -f 2
}

known_node() {
  local name
  for name in $(node_names); do [ "$name" = "${1:-}" ] && return; done
  fail "give the name of a node, n1 to n$NODES, not \"${1:-}\""
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status)
    alive "$DIR/slurmctld.pid" || fail "the cluster in $DIR is not up; start it with: $0 up"
    sinfo -N -l
    squeue -l
    ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  node-down) # as if its power failed
    known_node "${2:-}"
    if alive "$DIR/slurmd.$2.pid"; then kill -9 "$(cat "$DIR/slurmd.$2.pid")"; fi
    node_processes "$2" | xargs -r kill -9 2> /dev/null || true
    ;;
  node-up)
    known_node "${2:-}"
    alive "$DIR/slurmd.$2.pid" || slurmd -f "$SLURM_CONF" -N "$2"
    ;;
  *) fail "use: $0 up|down|status|env|node-down NODE|node-up NODE" ;;
esac
