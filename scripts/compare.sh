#!/bin/sh
# The same load on this store, on etcd and on Redis, one after the other, several times.
#
# Starts three nodes of this store and, where they are installed, three of etcd and one Redis with
# `appendfsync always`: every acknowledged write is on disk everywhere, on a majority for the first two.
# All run with their defaults, on ports of their own and in a temporary directory. The systems take
# turns in every round, so that whatever else the machine does disturbs all of them alike; the figures
# are medians over the rounds. Stops only what it started, also when it is interrupted. See lib.sh.
#
# The results stay in target/compare: raw.jsonl, one JSON object of `client bench --json` a run;
# table.md, what is printed at the end; compare.svg, the ratios. Settings come from the environment:
#
#   ROUNDS=3 SECONDS_EACH=5 CLIENTS='1 16 64 256' KEYS=100000 VALUE_BYTES=100 scripts/compare.sh
#   REDIS_CONNECTIONS=0     one for each client; 1: all share one and pipeline, many times as fast
#   SVG=docs/compare.svg    where the chart goes, for the one that the README shows
#   FIRST_ROUND=2           with ROUNDS=3, the second and third only, added to the results of the first:
#                           a comparison in several sittings
#
# The machine should have nothing else to do, and 3 GB of disk to spare. Takes about twelve minutes.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh
help_if_asked "$@"

ROUNDS=${ROUNDS:-3}
FIRST_ROUND=${FIRST_ROUND:-1}
SECONDS_EACH=${SECONDS_EACH:-5}
CLIENTS=${CLIENTS:-1 16 64 256}
KEYS=${KEYS:-100000}
VALUE_BYTES=${VALUE_BYTES:-100}
REDIS_CONNECTIONS=${REDIS_CONNECTIONS:-1}
# Long enough for connections, for leaders to be found and for caches to fill.
WARMUP_S=1

# In the order of the first round; peers are added as they start.
SYSTEMS='kvclient http'

# ---------------------------------------------------------------------------- the systems

# The addresses of a node, counted from 1.
kv_http() { printf '%s:2400%s' "$HOST" "$1"; }
kv_rpc() { printf '%s:2500%s' "$HOST" "$1"; }
etcd_client() { printf '%s:2600%s' "$HOST" "$1"; }
etcd_peer() { printf '%s:2700%s' "$HOST" "$1"; }
REDIS_PORT=28001

start_kv() {
    for node in 1 2 3; do
        start "kv-$node" "$BIN/raft-kv" --id "$node" --http-addr "$(kv_http "$node")" \
            --rpc-addr "$(kv_rpc "$node")" --data-dir "$WORK/kv-$node-db"
        KV_PIDS=${KV_PIDS:+$KV_PIDS,}$PID
        wait_ready "kv-$node" "$PID"
    done
    post_json "http://$(kv_http 1)/cluster/init" '{}'
    expect_status 'init' 200
    for node in 2 3; do
        post_json "http://$(kv_http 1)/cluster/add-learner" \
            "[$node,\"$(kv_http "$node")\",\"$(kv_rpc "$node")\"]"
        expect_status "add-learner $node" 200
    done
    post_json "http://$(kv_http 1)/cluster/change-membership" '[1,2,3]'
    expect_status 'change-membership' 200
    ok 'raft-kv: three nodes, one cluster'
}

start_etcd() {
    members="e1=http://$(etcd_peer 1),e2=http://$(etcd_peer 2),e3=http://$(etcd_peer 3)"
    for node in 1 2 3; do
        client_url="http://$(etcd_client "$node")" peer_url="http://$(etcd_peer "$node")"
        start "etcd-$node" etcd --name "e$node" --data-dir "$WORK/etcd-$node-db" \
            --listen-client-urls "$client_url" --advertise-client-urls "$client_url" \
            --listen-peer-urls "$peer_url" --initial-advertise-peer-urls "$peer_url" \
            --initial-cluster "$members" --initial-cluster-state new
        ETCD_PIDS=${ETCD_PIDS:+$ETCD_PIDS,}$PID
    done
    for node in 1 2 3; do
        wait_until "$SOON_S" "etcd node $node to be healthy" etcd_healthy "$node"
    done
    SYSTEMS="$SYSTEMS etcd"
    ok "$(etcd --version | sed -n 's/^etcd Version: /etcd /p'): three nodes, one cluster"
}

etcd_healthy() {
    try GET "http://$(etcd_client "$1")/health" || { FOUND=$BODY; return 1; }
    FOUND="$STATUS $BODY"
    [ "$(word health)" = true ]
}

start_redis() {
    mkdir "$WORK/redis-db"
    start redis redis-server --port "$REDIS_PORT" --bind "$HOST" --dir "$WORK/redis-db" \
        --appendonly yes --appendfsync always --save '' --daemonize no
    REDIS_PIDS=$PID
    wait_until "$SOON_S" 'Redis to be ready' grep -q 'Ready to accept connections' "$WORK/redis.out"
    SYSTEMS="$SYSTEMS redis"
    ok "Redis $(redis-server --version | sed -n 's/.* v=\([0-9.]*\).*/\1/p'): one node, appendfsync always"
}

# flags_for SYSTEM CLIENTS: sets FLAGS for `client bench`. Peers are driven as it was found to serve
# them best on two cores, by throughput: etcd over four connections to its leader rather than one for
# each client or to all members, Redis over one pipelined connection. More threads of the load program
# cost all of them more than they bring while few clients work, and Redis always.
flags_for() {
    kv=$(kv_http 1),$(kv_http 2),$(kv_http 3)
    members=$(etcd_client 1),$(etcd_client 2),$(etcd_client 3)
    threads=1
    if [ "$2" -gt 64 ] && [ "$1" != redis ]; then threads=2; fi
    case $1 in
    kvclient) FLAGS="--mode kvclient --endpoints $kv --cpu-of $KV_PIDS" ;;
    http) FLAGS="--mode http --endpoints $kv --cpu-of $KV_PIDS" ;;
    etcd) FLAGS="--target etcd --endpoints $members --connections 4 --cpu-of $ETCD_PIDS" ;;
    redis)
        FLAGS="--target redis --endpoints $HOST:$REDIS_PORT --cpu-of $REDIS_PIDS"
        FLAGS="$FLAGS --connections $REDIS_CONNECTIONS"
        ;;
    esac
    FLAGS="$FLAGS --threads $threads"
}

# ---------------------------------------------------------------------------- measuring

# run_client ARGUMENT...: `client` as a background process that is waited for, so that a signal to this
# script need not wait for the run to end.
run_client() {
    start bench "$BIN/client" "$@"
    reap "$PID"
    if [ "$EXIT_CODE" != 0 ]; then
        fail "client $*: expected exit code 0, found $EXIT_CODE: $(tail -n 1 "$WORK/bench.err")"
    fi
}

# fill SYSTEM: writes all keys.
fill() {
    flags_for "$1" 128
    # Splitting the flags is meant, here and below.
    # shellcheck disable=SC2086
    run_client bench $FLAGS --load --keys "$KEYS" --value-bytes "$VALUE_BYTES" --operations 0 \
        --warmup-seconds 0 --json
    ok "$1: $KEYS keys of $VALUE_BYTES bytes"
}

# measure ROUND SYSTEM WORKLOAD CLIENTS
measure() {
    flags_for "$2" "$4"
    # shellcheck disable=SC2086
    run_client bench $FLAGS --workload "$3" --clients "$4" --keys "$KEYS" \
        --value-bytes "$VALUE_BYTES" --seconds "$SECONDS_EACH" --warmup-seconds "$WARMUP_S" \
        --seed "$1" --json
    cat "$WORK/bench.out" >>"$RAW"
    BODY=$(cat "$WORK/bench.out")
    say "$(printf '%-5s %3s clients  %-9s %7s op/s' "$3" "$4" "$2" "$(number throughput)")"
}

run_round() {
    step "Round $round of $ROUNDS"
    for clients in $CLIENTS; do
        for workload in write read; do
            for system in $SYSTEMS; do measure "$round" "$system" "$workload" "$clients"; done
        done
    done
}

# backwards WORD...
backwards() {
    turned=''
    for word in "$@"; do turned="$word $turned"; done
    printf '%s' "$turned"
}

begin
title 'This store, etcd and Redis under the same load'
sh scripts/setup.sh
cargo build --release --features compare --bin raft-kv --bin client
TARGET=$(target_dir)
BIN=$TARGET/release
RESULTS=$TARGET/compare
RAW=$RESULTS/raw.jsonl
SVG=${SVG:-$RESULTS/compare.svg}
mkdir -p "$RESULTS"
if [ "$FIRST_ROUND" = 1 ]; then : >"$RAW"; fi
claim_ports 24001 24002 24003 25001 25002 25003

step 'Start'
KV_PIDS='' ETCD_PIDS='' REDIS_PIDS=''
start_kv
if command -v etcd >/dev/null 2>&1; then
    claim_ports 26001 26002 26003 27001 27002 27003
    start_etcd
else
    say 'etcd is not installed (apt-get install etcd-server): no ratios'
fi
if command -v redis-server >/dev/null 2>&1; then
    claim_ports "$REDIS_PORT"
    start_redis
else
    say 'Redis is not installed (apt-get install redis-server): left out'
fi

step 'Fill'
for system in $SYSTEMS; do
    # The same three nodes are measured in two ways.
    if [ "$system" != http ]; then fill "$system"; fi
done

round=1
while [ "$round" -le "$ROUNDS" ]; do
    if [ "$round" -ge "$FIRST_ROUND" ]; then run_round; fi
    # The next round takes them in the other order: nobody always comes after the same one.
    # shellcheck disable=SC2086
    SYSTEMS=$(backwards $SYSTEMS)
    round=$((round + 1))
done

step 'Medians'
"$BIN/client" bench-report "$RAW" --svg "$SVG" >"$RESULTS/table.md"
cat "$RESULTS/table.md"
say "raw results: $RAW"
say "chart:       $SVG"
