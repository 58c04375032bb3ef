#!/bin/bash
# test.sh: every check of the project: formatting, lints, dependencies, unit, scripts, unit tests and scenarios.
#
# Run as root on Debian 12 or 13 with a Rust toolchain; what else is missing it installs.
# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"

begin=$SECONDS
prepare

heading "format"
cargo fmt --all --check
cargo fmt --manifest-path tests/fuzz/Cargo.toml --check

heading "scripts"
shellcheck --external-sources .ci/run packaging/install.sh scripts/*.sh tests/lab/*.sh

heading "the unit's exposure (at most 2.2 of 10)"
systemd-analyze security --offline=true --threshold=22 --no-pager packaging/edged.service | tail -n 1
systemd-analyze security --offline=true --threshold=22 --no-pager packaging/edged-node.service | tail -n 1

heading "build"
build

heading "lints"
cargo clippy --release --workspace --all-targets --locked -- -D warnings

heading "fuzz (20 s for each parser)"
scripts/fuzz.sh 20

heading "tests (licences and sources of the dependencies, cores, scenarios in namespaces, nodes with systemd)"
cargo test --release --workspace --locked

heading "done"
printf 'all passed in %d s\n' $((SECONDS - begin))
