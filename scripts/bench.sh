#!/bin/bash
# bench.sh: benchmarks beside their peers, in one run: `scripts/bench.sh lb`, `scripts/bench.sh dns`;
# docs/benchmarks.md has method and options.
#
# Run as root on Debian 12 or 13 with a Rust toolchain; what else is missing it installs. EDGED_BIN_DIR is the folder of
# edged if it is not the one built here.
# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"

# Stdout is for the report alone, so that it can go into a file or a pipe.
{
  prepare
  heading "build"
  build
  heading "bench $*"
} >&2
target/release/bench "$@"
