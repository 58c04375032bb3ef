#!/bin/bash
# demo.sh [PART]: shows what the appliance does, live, in network namespaces of its own. Without PART: everything.
#
# Run as root on Debian 12 or 13 with a Rust toolchain; what else is missing it installs.
# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"

prepare
heading "build"
build
heading "demo"
exec target/release/demo "$@"
