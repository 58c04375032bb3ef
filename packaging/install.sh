#!/bin/sh
# install.sh: puts edged, edgectl and what belongs to them onto this machine, or into a folder to be packed.
#
#   packaging/install.sh [install] [--root DIR] [--from DIR]
#   packaging/install.sh uninstall [--purge] [--root DIR]
#
#   --root DIR   work in DIR instead of /, and touch nothing that runs
#   --from DIR   where the binaries are (default: target/release beside this folder)
#   --purge      also remove configuration, state, users and groups
#
# Installing again is safe: a configuration that is there stays, and the running daemon goes on until it is upgraded
# (edgectl upgrade /usr/bin/edged) or restarted.
set -eu

here=$(dirname "$(readlink -f "$0")")
root=
from=$here/../target/release
purge=
action=install

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '/^set /d'
}

while [ $# -gt 0 ]; do
  case $1 in
    install | uninstall) action=$1 ;;
    --root) root=${2:?--root needs a folder} && shift ;;
    --from) from=${2:?--from needs a folder} && shift ;;
    --purge) purge=yes ;;
    --help) usage && exit ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done

if [ -z "$root" ] && [ "$(id -u)" != 0 ]; then
  echo "install.sh: only root can do this; run it with sudo, or give --root DIR to prepare a package" >&2
  exit 1
fi

# Files, relative to the root.
unit=usr/lib/systemd/system/edged.service
node_unit=usr/lib/systemd/system/edged-node.service
sysusers=usr/lib/sysusers.d/edged.conf
sysctl=usr/lib/sysctl.d/60-edged.conf
config=etc/edged/edged.toml
node_config=etc/edged/node.env
bash=usr/share/bash-completion/completions/edgectl
zsh=usr/share/zsh/vendor-completions/_edgectl
fish=usr/share/fish/vendor_completions.d/edgectl.fish
man=usr/share/man/man1

# Renamed into place, so that at no moment half a file or none is there.
put() {
  install -D -m "$1" "$2" "$root/$3.edged-new"
  mv -f "$root/$3.edged-new" "$root/$3"
}

systemd_runs() {
  [ -z "$root" ] && [ -d /run/systemd/system ]
}

install_all() {
  made=$(mktemp -d)
  trap 'rm -rf "$made"' EXIT
  for binary in edged edgectl; do
    if [ ! -x "$from/$binary" ]; then
      echo "install.sh: there is no $from/$binary; build it with: cargo build --release --workspace --locked" >&2
      exit 1
    fi
  done
  put 0755 "$from/edged" usr/bin/edged
  put 0755 "$from/edgectl" usr/bin/edgectl
  put 0644 "$here/edged.service" "$unit"
  put 0644 "$here/edged-node.service" "$node_unit"
  put 0644 "$here/sysusers.d/edged.conf" "$sysusers"
  put 0644 "$here/sysctl.d/60-edged.conf" "$sysctl"
  for shell in bash zsh fish; do "$from/edgectl" completions "$shell" >"$made/$shell"; done
  put 0644 "$made/bash" "$bash"
  put 0644 "$made/zsh" "$zsh"
  put 0644 "$made/fish" "$fish"
  mkdir "$made/man"
  "$from/edgectl" man "$made/man"
  for page in "$made"/man/*; do put 0644 "$page" "$man/$(basename "$page")"; done
  if [ ! -e "$root/$config" ]; then put 0644 "$here/edged.toml" "$config"; fi
  if [ ! -e "$root/$node_config" ]; then put 0644 "$here/node.env" "$node_config"; fi
  if [ -z "$root" ]; then systemd-sysusers "/$sysusers"; fi
  if ! systemd_runs; then return; fi
  /lib/systemd/systemd-sysctl "/$sysctl"
  systemctl daemon-reload
  if systemctl --quiet is-active edged-node; then
    echo "Installed; the running edged-node is still the old one. Next: systemctl restart edged-node (sessions are cut)"
  fi
  if systemctl --quiet is-active edged; then
    echo "Installed; the running edged is still the old one. Next: edgectl upgrade /usr/bin/edged (nobody is refused, no session is cut)"
  else
    echo "Installed. Next: edit /$config, then: edgectl config check /$config && systemctl enable --now edged"
  fi
}

uninstall_all() {
  made=$(mktemp -d)
  trap 'rm -rf "$made"' EXIT
  if systemd_runs && [ -e "/$unit" ]; then systemctl --quiet disable --now edged; fi
  if systemd_runs && [ -e "/$node_unit" ]; then systemctl --quiet disable --now edged-node; fi
  rm -f "$root/usr/bin/edged" "$root/usr/bin/edgectl" "$root/$unit" "$root/$node_unit" "$root/$sysctl" "$root/$bash" "$root/$zsh" "$root/$fish"
  rm -f "$root/$man/edgectl.1" "$root/$man"/edgectl-*.1
  if [ -n "$purge" ]; then
    rm -rf "$root/etc/edged" "$root/var/lib/edged"
    # A unit with a user of its own for each run has its state here, and a link to it where others have theirs.
    rm -rf "$root/var/lib/private/edged-node" "$root/var/lib/edged-node"
    if [ -z "$root" ]; then
      if getent passwd edged >/dev/null; then userdel edged; fi
      for group in edged edge edge-admin; do if getent group "$group" >/dev/null; then groupdel "$group"; fi; done
    fi
  fi
  rm -f "$root/$sysusers"
  if systemd_runs; then systemctl daemon-reload; fi
  if [ -z "$purge" ]; then
    echo "Removed. Configuration (/etc/edged), state (/var/lib/edged) and users are kept; uninstall --purge removes them too."
  fi
}

case $action in
  install) install_all ;;
  uninstall) uninstall_all ;;
esac
