#!/bin/sh
# Set-up plus `cargo test`; arguments go to cargo.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh
exec cargo test "$@"
