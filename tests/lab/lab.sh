#!/bin/bash
# lab.sh: Debian systems with systemd as PID 1 and sshd, each in a network namespace of its own, on one machine.
#
#   lab.sh rootfs            build the root filesystem that nodes share, unless it is there (30 seconds to 2 minutes)
#   lab.sh up [N]            make a bridge and boot node1 to nodeN on it (default 1); a few seconds
#   lab.sh down              take away what `up` made
#   lab.sh boot NAME NETNS   boot one node in a network namespace that exists
#   lab.sh halt NAME         power it off and remove it; the namespace stays
#   lab.sh ssh NAME CMD...   run CMD as root on it
#   lab.sh root NAME         print the folder that is its / on this machine
#
# Environment: LAB_DIR (default /var/tmp/edge-lab; kept between runs), LAB_SUITE (trixie), LAB_PACKAGES (see below),
# LAB_BIND (HOST:NODE folders or files that nodes see, read-only; none), LAB_TIMEOUT (60 seconds for a node to come up).
# README.md says how it works.
set -euo pipefail

LAB_DIR=${LAB_DIR:-/var/tmp/edge-lab}
LAB_SUITE=${LAB_SUITE:-trixie}
LAB_PACKAGES=${LAB_PACKAGES:-systemd systemd-sysv dbus udev kmod openssh-server iproute2 iputils-ping procps nftables ca-certificates}
read -ra binds <<<"${LAB_BIND:-}"
LAB_TIMEOUT=${LAB_TIMEOUT:-60}

# One root filesystem per suite and list of packages.
packages=$(tr -s ' \n' '\n' <<<"$LAB_PACKAGES" | sort -u | paste -sd, -)
rootfs=$LAB_DIR/rootfs-$LAB_SUITE-$(sha256sum <<<"$packages" | cut -c1-8)
key=$LAB_DIR/id_ed25519

die() {
  printf 'lab: %s\n' "$*" >&2
  exit 1
}

need() {
  [ "$(id -u)" = 0 ] || die "nodes need root: run as root"
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install iproute2 mmdebstrap openssh-client procps systemd-container util-linux"
  done
}

# Runs a function of this script while no other lab.sh does.
alone() {
  mkdir -p "$LAB_DIR/run"
  chmod 700 "$LAB_DIR"
  exec 9>"$LAB_DIR/lock"
  flock 9
  "$@"
  exec 9>&-
}

build_rootfs() {
  [ -f "$key" ] || ssh-keygen -q -t ed25519 -N '' -C edge-lab -f "$key"
  [ ! -d "$rootfs" ] || return 0
  echo "lab: building $rootfs ($packages)"
  # What an interrupted build left is ours and of no use.
  rm -rf "$rootfs.part"
  mmdebstrap --quiet --variant=minbase --include="$packages" \
    --aptopt='Acquire::Languages "none"' --dpkgopt='force-unsafe-io' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$LAB_SUITE" "$rootfs.part"
  mv "$rootfs.part" "$rootfs"
}

# The cgroup trees a node gets a group of its own in: the v2 tree, and systemd's own on a machine with v1 trees.
cgroups() {
  findmnt -rn -t cgroup2 -o TARGET | head -n 1
  findmnt -rn -t cgroup -O name=systemd -o TARGET | head -n 1
}

# Whether the node's process runs. Its number may belong to someone else by now: ask for the name too.
alive() {
  tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$LAB_DIR/run/$1/pid" 2>/dev/null)/cmdline" | grep -q -- "--machine=$1 "
}

start() {
  local name=$1 netns=$2 dir=$LAB_DIR/run/$1 group
  ! alive "$name" || die "node $name runs already: lab.sh halt $name"
  mkdir "$dir"
  # In memory: an overlay cannot lie on another one, as in a container, and nothing of a node is left behind.
  mount -t tmpfs -o mode=0700 "edge-lab-$name" "$dir"
  echo "$netns" >"$dir/netns"
  mkdir -p "$dir"/{upper,work,root}
  mount -t overlay overlay -o "lowerdir=$rootfs,upperdir=$dir/upper,workdir=$dir/work" "$dir/root"
  echo "$name" >"$dir/root/etc/hostname"
  printf '127.0.0.1 localhost %s\n::1 localhost %s\n' "$name" "$name" >"$dir/root/etc/hosts"
  rm -f "$dir/root/etc/machine-id"
  tr -d - </proc/sys/kernel/random/uuid >"$dir/root/etc/machine-id"
  mkdir -p "$dir/root/root/.ssh"
  cp "$key.pub" "$dir/root/root/.ssh/authorized_keys"
  (
    # Nodes started from one cgroup would share one payload group: stopping a service in one would kill it in another.
    for group in $(cgroups); do
      mkdir -p "$group/edge-lab-$name"
      echo "$BASHPID" >"$group/edge-lab-$name/cgroup.procs"
    done
    # --register=no --keep-unit: the machine itself may have no systemd. A namespace given by path does not count as
    # private, hence the capabilities and the writable /proc/sys, without which nft and sysctl fail in the node. The
    # system calls are those a machine of its own would have and nspawn withholds.
    exec env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_API_VFS_WRITABLE=1 setsid \
      systemd-nspawn --quiet --register=no --keep-unit --machine="$name" -D "$dir/root" \
      --network-namespace-path="/run/netns/$netns" --resolv-conf=off --timezone=off --console=read-only \
      --capability=all "${binds[@]/#/--bind-ro=}" --boot \
      --system-call-filter='add_key keyctl bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self'
  ) >"$dir/console.log" 2>&1 </dev/null 9>&- &
  echo $! >"$dir/pid"
  # Until it carries its name, a sweep would take it for dead.
  while kill -0 $! && ! alive "$name"; do sleep 0.01; done
}

# From inside its namespace, so that no route has to lead there.
node_ssh() {
  local netns
  netns=$(cat "$LAB_DIR/run/$1/netns" 2>/dev/null) || die "there is no node $1"
  ip netns exec "$netns" ssh -q -i "$key" -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    -o ConnectTimeout=10 root@::1 "${@:2}"
}

await() {
  local name=$1 state='' end=$((SECONDS + LAB_TIMEOUT))
  while [ "$SECONDS" -lt "$end" ]; do
    # Answers when the boot is over; that some unit failed is not for the lab to judge.
    state=$(node_ssh "$name" timeout 10 systemctl is-system-running --wait 2>/dev/null || true)
    case $state in running | degraded) return ;; esac
    alive "$name" || break
    sleep 0.1
  done
  tail -n 20 "$LAB_DIR/run/$name/console.log" >&2
  die "node $name did not come up within $LAB_TIMEOUT s (${state:-no answer}); its console: $LAB_DIR/run/$name/console.log"
}

# Removes a node whose process has ended.
remove() {
  local name=$1 dir=$LAB_DIR/run/$1 group
  [ -d "$dir" ] || return 0
  if mountpoint -q "$dir/root"; then umount -R "$dir/root"; fi
  for group in $(cgroups); do
    [ ! -d "$group/edge-lab-$name" ] || find "$group/edge-lab-$name" -depth -type d -exec rmdir {} \;
  done
  if mountpoint -q "$dir"; then umount "$dir"; fi
  rmdir "$dir"
}

# Removes what is left of nodes that were killed together with whoever booted them.
sweep() {
  local dir
  for dir in "$LAB_DIR"/run/*/; do
    if [ -d "$dir" ] && ! alive "$(basename "$dir")"; then remove "$(basename "$dir")"; fi
  done
}

boot() {
  need flock findmnt ip mmdebstrap setsid ssh ssh-keygen systemd-nspawn
  [ -e "/run/netns/${2:?in which network namespace}" ] || die "there is no network namespace $2"
  alone build_rootfs
  alone sweep
  alone start "$@"
}

halt() {
  need findmnt ip ssh
  local name=$1 end=$((SECONDS + 10))
  [ -d "$LAB_DIR/run/$name" ] || return 0
  timeout 5 "$0" ssh "$name" systemctl poweroff >/dev/null 2>&1 || true
  while alive "$name" && [ "$SECONDS" -lt "$end" ]; do sleep 0.1; done
  ! alive "$name" || kill -KILL "$(cat "$LAB_DIR/run/$name/pid")"
  while alive "$name"; do sleep 0.1; done
  alone remove "$name"
}

up() {
  need ip sysctl
  local nodes=${1:-1} i ns
  [ ! -e /run/netns/lab-sw ] || die "a lab is up already: lab.sh down"
  ip netns add lab-sw
  ip -n lab-sw link set lo up
  ip -n lab-sw link add br0 type bridge forward_delay 0 mcast_snooping 0
  ip -n lab-sw addr add fd64:1ab::ffff/64 dev br0 nodad
  ip -n lab-sw link set br0 up
  for i in $(seq 1 "$nodes"); do
    ns=lab-node$i
    ip netns add "$ns"
    ip -n "$ns" link set lo up
    ip -n lab-sw link add "node$i" type veth peer name eth0 netns "$ns"
    ip -n lab-sw link set "node$i" master br0 up
    ip -n "$ns" addr add "fd64:1ab::$i/64" dev eth0 nodad
    ip -n "$ns" link set eth0 up
    ip -n "$ns" -6 route add default via fd64:1ab::ffff
    boot "node$i" "$ns"
  done
  for i in $(seq 1 "$nodes"); do await "node$i"; done
}

down() {
  need ip
  local ns
  for ns in $(ip netns list | grep -oE '^lab-node[0-9]+'); do
    halt "${ns#lab-}"
    ip netns del "$ns"
  done
  [ ! -e /run/netns/lab-sw ] || ip netns del lab-sw
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
  rootfs)
    need flock mmdebstrap ssh-keygen
    alone build_rootfs
    ;;
  up) up "$@" ;;
  down) down ;;
  boot)
    boot "$@"
    await "$1"
    ;;
  halt) halt "${1:?which node}" ;;
  ssh) node_ssh "$@" ;;
  root) echo "$LAB_DIR/run/${1:?which node}/root" ;;
  *)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '/^set /d' >&2
    exit 2
    ;;
esac
