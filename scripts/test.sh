#!/bin/sh
# Set-up plus `cargo test`, which shows every failure and not only the first; arguments go to cargo.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
exec cargo test --no-fail-fast "$@"
