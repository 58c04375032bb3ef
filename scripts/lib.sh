# shellcheck shell=bash
# lib.sh: what the scripts of this folder have in common; sourced, not run. Leaves the working directory at the top.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Debian packages, by what calls them.
packages=(
  ca-certificates gcc libc6-dev                             # the build: rustc's linker, aws-lc-rs's C and assembly
  g++                                                       # the fuzzer's engine
  iproute2 netbase nftables procps strace tcpdump util-linux  # the lab: namespaces, faults (by protocol name), captures
  mmdebstrap openssh-client systemd-container               # nodes: Debian under systemd-nspawn, reached over SSH
  etcd-client etcd-server                                   # the demo's Kubernetes-like world
  curl haproxy libnginx-mod-stream nginx                    # peers, measured and compared beside us: balancers,
  bind9 bind9-dnsutils unbound                              # resolvers, and dig, delv and nsupdate before ours
  shellcheck systemd                                        # the checks of the scripts and of the unit
)

# The commands of those packages that the scripts and the tests call.
tools=(
  cc g++ ip nft ps strace tcpdump findmnt mmdebstrap ssh systemd-nspawn etcdctl etcd curl haproxy nginx named unbound
  dig delv nsupdate shellcheck systemd-analyze
)

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# heading TEXT: what follows, after the time that what came before has taken.
section='' section_begin=0
heading() {
  [ -z "$section" ] || printf '    (%d s)\n' $((SECONDS - section_begin))
  section=$* section_begin=$SECONDS
  printf '\n==> %s\n' "$section"
}

# 101 is what a package's scripts take for "do not start this service".
policy=/usr/sbin/policy-rc.d policy_is_ours=''
forbid_services() {
  [ ! -e "$policy" ] || return 0
  policy_is_ours=yes
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
}

allow_services() {
  [ -z "$policy_is_ours" ] || rm -f "$policy"
  policy_is_ours=''
}

finish() {
  local code=$?
  allow_services
  [ "$code" = 0 ] || printf '\nFAILED: %s\n' "${section:-$(basename "$0")}" >&2
}
trap finish EXIT

need_root() {
  [ "$(id -u)" = 0 ] || die "this makes network namespaces and boots nodes, which takes root: run $0 as root"
}

need_rust() {
  if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH=$HOME/.cargo/bin:$PATH; fi
  command -v cargo >/dev/null || die "there is no cargo; install a Rust toolchain (rustup), at least the rust-version of Cargo.toml, with clippy and rustfmt"
}

# Installs the packages of this machine's Debian that are missing. Services that come with them are neither started
# now nor at the next boot.
install_packages() {
  local missing=() package service units=/lib/systemd/system ours=()
  for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
  done
  [ ${#missing[@]} != 0 ] || return 0
  command -v apt-get >/dev/null || die "this is no Debian; install what provides: ${tools[*]}"
  echo "installing ${missing[*]}"
  for service in etcd haproxy named nginx unbound; do
    if [ ! -e "$units/$service.service" ]; then ours+=("$service"); fi
  done
  export DEBIAN_FRONTEND=noninteractive
  forbid_services
  apt-get update -q
  apt-get install -q -y --no-install-recommends "${missing[@]}"
  allow_services
  for service in "${ours[@]}"; do
    if [ -e "$units/$service.service" ]; then systemctl --quiet disable "$service"; fi
  done
}

need_tools() {
  local tool
  for tool in "${tools[@]}"; do
    command -v "$tool" >/dev/null || die "$tool is missing although its package is installed; is /usr/sbin in PATH?"
  done
}

# Everything, in the one profile that tests, demo, benchmarks and packages share.
build() {
  cargo build --release --workspace --locked --all-targets
}

prepare() {
  need_root
  export PATH=$PATH:/usr/sbin:/sbin
  need_rust
  heading "packages"
  install_packages
  need_tools
}
