#!/usr/bin/env bash
# A real Slurm of two virtual nodes on one Debian machine, for tests and for trying things out. No systemd, GPU or DNS.
#
#   cluster.sh start DIR    install what is missing, configure, start, wait until idle; then: . DIR/env
#   cluster.sh stop DIR     stop exactly the processes that were started here
#
# Needs root with CAP_SYS_ADMIN, for `unshare`. SLURM_TEST_PORT (16800) and the 20 after it must be free.
# Logs: DIR/log, slurmctld.log first, then slurmd.n1.log.
set -euo pipefail

COMMAND=${1:-} DIR=${2:-} PORT=${SLURM_TEST_PORT:-16800}
[[ $COMMAND =~ ^(start|stop)$ && $DIR == /* ]] || { sed -n 2,9p "$0"; exit 2; }
NODES=2 CPUS=4 GPUS=2
ETC=$DIR/etc LOG=$DIR/log RUN=$DIR/run
export SLURM_CONF=$ETC/slurm.conf

die() { echo "$*; see $LOG" >&2; tail -n 5 "$LOG"/*.log >&2 2>/dev/null || true; exit 1; }
# a zombie has an empty command line, so that it does not count
runs() { tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -q "^\S*$2 \?"; }
alive() { [ -s "$RUN/$1.pid" ] && runs "$(cat "$RUN/$1.pid")" "${1%%.*}"; }
until_ok() { # SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until timeout 5 "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.1; done
}

install() { # one at a time: dpkg has one lock, which it does not wait for
  (flock 9 && install_missing) 9>/tmp/hive-slurm-install.lock
}

install_missing() {
  local packages=(slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core) missing=()
  for p in "${packages[@]}"; do dpkg -s "$p" >/dev/null 2>&1 || missing+=("$p"); done
  ((${#missing[@]})) || return 0
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >"$LOG/apt.log" 2>&1 || die "apt-get"
}

configure() {
  [ -s "$ETC/munge.key" ] || { head -c 128 /dev/urandom >"$ETC/munge.key"; chmod 400 "$ETC/munge.key"; }
  # gres.conf wants devices, and without File= no CUDA_VISIBLE_DEVICES is set
  for ((g = 0; g < GPUS; g++)); do ln -sf /dev/null "$DIR/dev/nvidia$g"; done
  echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >"$ETC/gres.conf"
  # node names resolve inside the nodes only
  { cat /etc/hosts; for ((i = 1; i <= NODES; i++)); do echo "127.0.0.$((10 + i)) n$i"; done; } >"$ETC/hosts"
  cat >"$ETC/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
LogFile=$LOG/slurmdbd.log
PidFile=$RUN/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=slurm
CONF
  chmod 600 "$ETC/slurmdbd.conf"
  cat >"$ETC/init.sql" <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
SQL
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire (at least 5) is also how long a requeued job waits: 120 s by default
AuthInfo=socket=$RUN/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
ReturnToService=2
# CPUs and memory are taken as written here, whatever the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
GresTypes=gpu
# fast decisions
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=20
MinJobAge=600
SlurmdTimeout=20
# partition gpu takes from scavenge: TERM and USR2 at once, KILL after GraceTime
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$RUN/munge.socket
AccountingStorageTRES=gres/gpu
$(for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=n$i NodeAddr=127.0.0.$((10 + i)) Port=$((PORT + 10 + i)) CPUs=$CPUS RealMemory=4096 Gres=gpu:$GPUS"
  done)
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=1-0 State=UP
PartitionName=scavenge Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=1-0 State=UP
CONF
  echo "export SLURM_CONF=$SLURM_CONF" >"$DIR/env"
}

start() {
  mkdir -p "$ETC" "$LOG" "$RUN" "$DIR"/{state,spool,dev}
  chmod 755 "$DIR" "$ETC" "$LOG" "$RUN" # munged refuses a path that a group may write
  install
  configure
  alive munged || munged --force --key-file="$ETC/munge.key" --socket="$RUN/munge.socket" \
    --pid-file="$RUN/munged.pid" --log-file="$LOG/munged.log" --seed-file="$RUN/munged.seed" || die munged
  # mariadb-client-core holds what mariadb-install-db needs
  [ -d "$DIR/mysql/mysql" ] || mariadb-install-db --no-defaults --datadir="$DIR/mysql" --user=root \
    --auth-root-authentication-method=socket --skip-test-db >"$LOG/mariadb-install.log" 2>&1 || die mariadb-install-db
  if ! alive mariadbd; then # it does not go to the background by itself
    setsid mariadbd --no-defaults --user=root --datadir="$DIR/mysql" --init-file="$ETC/init.sql" --port=$((PORT + 2)) \
      --bind-address=127.0.0.1 --socket="$RUN/mariadbd.socket" --pid-file="$RUN/mariadbd.pid" --skip-name-resolve \
      --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
      --loose-innodb-snapshot-isolation=OFF </dev/null >>"$LOG/mariadbd.log" 2>&1 &
  fi
  until_ok 120 mariadb --no-defaults -h127.0.0.1 -P$((PORT + 2)) -uslurm -pslurm -e 'USE slurm_acct_db' || die mariadbd
  alive slurmdbd || slurmdbd >>"$LOG/start.log" 2>&1 || die slurmdbd
  until_ok 120 sacctmgr -n list cluster || die slurmdbd
  alive slurmctld || slurmctld >>"$LOG/start.log" 2>&1 || die slurmctld
  for ((i = 1; i <= NODES; i++)); do # each with a host name and an /etc/hosts of its own
    alive slurmd.n$i || unshare --uts --mount sh -c \
      "hostname n$i && mount --bind '$ETC/hosts' /etc/hosts && exec slurmd -N n$i" >>"$LOG/start.log" 2>&1 || die "slurmd n$i"
  done
  until_ok 180 sh -c "[ \$(sinfo -h -N -p gpu -t idle,mix,alloc -o %N | wc -l) = $NODES ]" || die "the nodes did not come up"
  echo "$(slurmctld -V), $NODES nodes: . $DIR/env"
}

stop_one() { # NAME: TERM, after 10 s KILL, to the pid in NAME.pid if it still is that program
  local pid
  alive "$1" || return 0
  pid=$(cat "$RUN/$1.pid")
  kill "$pid"
  for _ in $(seq 200); do runs "$pid" "${1%%.*}" || return 0; sleep 0.05; done
  kill -9 "$pid"
}

stop() {
  # first the jobs, so that none of their processes outlives the daemons
  if timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
    squeue -h -o %i | xargs -r timeout 10 scancel || true
    for _ in $(seq 200); do [ -z "$(squeue -h)" ] && break; sleep 0.1; done
  fi
  for name in slurmd.n1 slurmd.n2 slurmctld slurmdbd mariadbd munged; do stop_one "$name"; done
}

$COMMAND
