#!/bin/bash
# fuzz.sh [SECONDS] [TARGET...]: feeds the parsers what a fuzzer comes up with that sees which branches it reaches.
#
# All targets (tests/fuzz/src/bin), two at a time, 20 seconds each unless told otherwise. What makes one crash, hang or
# break a promise is kept in target/fuzz/crashes, tried first the next time, and shown with the command that repeats it.
# Needs a stable Rust toolchain and a C++ compiler, and no root. CONTRIBUTING.md tells what to do with a finding.
# shellcheck source=scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/lib.sh"

seconds=20
if [[ ${1-} =~ ^[0-9]+$ ]]; then
  seconds=$1
  shift
fi
known=()
for file in tests/fuzz/src/bin/*.rs; do known+=("$(basename "$file" .rs)"); done
targets=("${@:-${known[@]}}")
for target in "${targets[@]}"; do
  [[ " ${known[*]} " == *" $target "* ]] || die "there is no target $target; there are: ${known[*]}"
done

need_rust
command -v g++ >/dev/null || die "there is no g++, which builds the fuzzer's engine: apt-get install g++"
host=$(rustc -vV | sed -n 's/^host: //p')
work=target/fuzz

# What cargo-fuzz passes too: LLVM counts every branch and reports every comparison. With --target it does so in the
# programs only, not in what builds them.
coverage=(
  -Cpasses=sancov-module
  -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
  -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-trace-compares
)
RUSTFLAGS="${coverage[*]} --cfg fuzzing" cargo build --release --locked \
  --manifest-path tests/fuzz/Cargo.toml --target "$host" --target-dir "$work"

# run TARGET: fuzzes it; one line if all is well, else the finding.
run() {
  local target=$1 log=$work/$1.log binary=$work/$host/release/$1 crashes=$work/crashes/$1 corpus=$work/corpus/$1
  local options=(
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=4096 -print_final_stats=1
    -artifact_prefix="$crashes/"
  )
  [ ! -e "tests/fuzz/dictionaries/$target" ] || options+=(-dict="tests/fuzz/dictionaries/$target")
  mkdir -p "$corpus" "$crashes"
  if "$binary" "${options[@]}" "$corpus" "tests/fuzz/seeds/$target" "$crashes" >"$log" 2>&1; then
    printf '%-12s %10d runs, %5d branches reached, no finding\n' "$target" \
      "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
      "$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)"
    return
  fi
  local finding
  finding=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
  {
    printf '\n%s: FOUND %s\n' "$target" "${finding:-nothing, but the fuzzer failed}"
    grep -a -A 3 -E 'panicked at|ERROR: libFuzzer' "$log" || tail -n 20 "$log"
    printf 'all of it:  less %s\n' "$log"
    [ -z "$finding" ] || printf 'once more:  %s %s\n' "$binary" "$finding"
  } >&2
  return 1
}

failed=0
for index in "${!targets[@]}"; do
  if ((index >= 2)); then wait -n || failed=$((failed + 1)); fi
  run "${targets[index]}" &
done
for _ in "${targets[@]:0:2}"; do wait -n || failed=$((failed + 1)); done
[ "$failed" = 0 ] || die "$failed of ${#targets[@]} targets have a finding, see above"
