#!/bin/sh
# How the store takes more: more keys, larger values, more clusters, a long run, a lost leader, a follower
# that sleeps, a restart with much data. Each part starts clusters of its own on ports of its own in a
# temporary directory, and stops only what it started. See lib.sh.
#
#   scripts/scale.sh [PART...]      parts: keys sizes clusters follower failover restart steady; all of them
#                                   take about an hour and 40 GB of disk
#   SECONDS_EACH=5 KEYS_MANY=10000000 ROW_CACHE=2147483648 GIB=5 TRIALS=20 STEADY_S=600 scripts/scale.sh
#
# Tables show ratios to their first row. What is printed stays in target/scale/PART.md.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh
help_if_asked "$@"

SECONDS_EACH=${SECONDS_EACH:-5}
KEYS=${KEYS:-100000}
KEYS_MANY=${KEYS_MANY:-10000000}
ROW_CACHE=${ROW_CACHE:-2147483648}
GIB=${GIB:-5}
TRIALS=${TRIALS:-20}
STEADY_S=${STEADY_S:-600}

# The address of node $2 of cluster $1, both counted from 1.
kv_http() { printf '%s:%s' "$HOST" $((24000 + 10 * $1 + $2)); }
kv_rpc() { printf '%s:%s' "$HOST" $((25000 + 10 * $1 + $2)); }

# start_node CLUSTER NODE: with the configuration in NODE_CONFIG, if that names a file.
NODE_CONFIG=''
start_node() {
    start "c$1-$2" "$BIN/raft-kv" --cluster "c$1" --id "$2" --http-addr "$(kv_http "$1" "$2")" \
        --rpc-addr "$(kv_rpc "$1" "$2")" --data-dir "$WORK/c$1-$2-db" ${NODE_CONFIG:+--config "$NODE_CONFIG"}
    wait_ready "c$1-$2" "$PID" 600
}

# start_clusters COUNT NODES: sets KV_PIDS and writes the nodes file.
start_clusters() {
    KV_PIDS='' nodes_json=''
    cluster=1
    while [ "$cluster" -le "$1" ]; do
        node=1 members='' json=''
        while [ "$node" -le "$2" ]; do
            start_node "$cluster" "$node"
            KV_PIDS=${KV_PIDS:+$KV_PIDS,}$PID
            members=${members:+$members,}$node
            json=${json:+$json,}\"$(kv_http "$cluster" "$node")\"
            node=$((node + 1))
        done
        post_json "http://$(kv_http "$cluster" 1)/cluster/init" '{}'
        expect_status 'init' 200
        node=2
        while [ "$node" -le "$2" ]; do
            post_json "http://$(kv_http "$cluster" 1)/cluster/add-learner" \
                "[$node,\"$(kv_http "$cluster" "$node")\",\"$(kv_rpc "$cluster" "$node")\"]"
            expect_status "add-learner $node" 200
            node=$((node + 1))
        done
        post_json "http://$(kv_http "$cluster" 1)/cluster/change-membership" "[$members]"
        expect_status 'change-membership' 200
        nodes_json=${nodes_json:+$nodes_json,}[$json]
        cluster=$((cluster + 1))
    done
    printf '[%s]\n' "$nodes_json" >"$WORK/nodes.json"
    if [ "$1" -gt 1 ]; then
        "$BIN/admin" ring install --nodes-file "$WORK/nodes.json" >"$WORK/ring.out"
    fi
}

stop_clusters() {
    for pid in $(printf '%s' "$KV_PIDS" | tr ',' ' '); do stop "$pid"; done
    rm -rf "$WORK"/c*-db
}

# bench ARGUMENT...: one run of the load program; its result is in BODY.
bench() {
    start bench "$BIN/client" bench --nodes-file "$WORK/nodes.json" --cpu-of "$KV_PIDS" --json "$@"
    reap "$PID"
    if [ "$EXIT_CODE" != 0 ]; then fail "client bench $*: $(tail -n 1 "$WORK/bench.err")"; fi
    BODY=$(cat "$WORK/bench.out")
}

# fill KEYS VALUE_BYTES
fill() {
    bench --load --keys "$1" --value-bytes "$2" --operations 0 --warmup-seconds 0 --clients 128 \
        --threads 2
}

# The processor time that all nodes have taken, in clock ticks.
ticks() {
    for pid in $(printf '%s' "$KV_PIDS" | tr ',' ' '); do cat "/proc/$pid/stat"; done \
        | awk '{ ticks += $14 + $15 } END { print ticks }'
}

# Waits until the nodes rest: what compaction has left to do would count as the load's. Four minutes at most.
rest() {
    nodes=$(printf '%s' "$KV_PIDS" | tr ',' '\n' | grep -c .)
    for _ in $(seq 120); do
        before=$(ticks)
        sleep 2
        # 3 % of a processor for each: heartbeats take a part of that.
        if [ $(($(ticks) - before)) -lt $((nodes * 6)) ]; then return 0; fi
    done
    say 'the nodes do not come to rest; measuring all the same'
}

decimal() { printf '%s\n' "$BODY" | sed -n "s/.*$1\([0-9.]*\).*/\1/p"; }

# measure LABEL KEYS VALUE_BYTES [TIMES]: a row for each workload, number of clients and kind of client.
# With TIMES, so many times the clients are at work; the row still bears the number before.
measure() {
    for workload in write read; do
        rest
        for clients in 16 256; do
            for mode in kvclient http; do
                bench --workload "$workload" --clients $((clients * ${4:-1})) --mode "$mode" --keys "$2" \
                    --value-bytes "$3" --seconds "$SECONDS_EACH" --warmup-seconds 2 --threads 2
                p99=$(printf '%s\n' "$BODY" | sed 's/.*"operations":[0-9]*//;s/"by_operation.*//' \
                    | sed -n 's/.*"p99":\([0-9.]*\).*/\1/p')
                printf '%s|%s|%s|%s|%s|%s|%s\n' "$workload" "$clients" "$mode" "$1" \
                    "$(decimal '"throughput":')" \
                    "$(decimal '"server_cpu":{[^}]*"us_per_operation":')" "$p99" >>"$ROWS"
            done
        done
    done
}

# table WHAT: the rows, as ratios to the first with the same workload, clients and kind of client.
table() {
    {
        printf '| load | %s | throughput | CPU an operation | p99 |\n' "$1"
        printf '| --- | --- | ---: | ---: | ---: |\n'
        sort -s -t '|' -k 1,1r -k 2,2n -k 3,3r "$ROWS" | awk -F '|' '
            { kind = $1 ", " $2 " clients, " ($3 == "http" ? "plain HTTP" : "KVClient")
              if (kind != last) { t = $5; c = $6; p = $7; last = kind }
              printf "| %s | %s | %.2f | %.2f | %.2f |\n", kind, $4, $5 / t, $6 / c, $7 / p }'
    } >"$RESULTS/$PART.md"
    show "$RESULTS/$PART.md"
}

# resident: the largest of the nodes, in MB.
resident() {
    for pid in $(printf '%s' "$KV_PIDS" | tr ',' ' '); do
        sed -n 's/^VmRSS:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$pid/status"
    done | sort -n | tail -n 1 | awk '{ printf "%d", $1 / 1024 }'
}

note() { printf '%s\n' "$*" | tee -a "$RESULTS/$PART.md" | sed 's/^/    /'; }

now_ms() { echo $(($(date +%s%N) / 1000000)); }

# ---------------------------------------------------------------------------- the parts

part_keys() {
    start_clusters 1 3
    fill "$KEYS" 100
    measure "$KEYS keys" "$KEYS" 100
    fill "$KEYS_MANY" 100
    measure "$KEYS_MANY keys" "$KEYS_MANY" 100
    default_mb=$(resident)
    disk_mb=$(du -sm "$WORK/c1-1-db" | cut -f 1)
    stop_clusters
    # The same with room in memory for every row.
    NODE_CONFIG=$WORK/rows.toml
    printf '[storage]\nrow_cache_bytes = %s\n' "$ROW_CACHE" >"$NODE_CONFIG"
    start_clusters 1 3
    fill "$KEYS_MANY" 100
    measure "$KEYS_MANY keys, in memory" "$KEYS_MANY" 100
    table keys
    note "Largest node: $default_mb MB resident, with all rows in memory $(resident); on disk $disk_mb MB."
    stop_clusters
    NODE_CONFIG=''
}

part_sizes() {
    for bytes in 100 1024 65536; do
        start_clusters 1 3
        fill $((bytes > 10000 ? KEYS / 20 : KEYS)) "$bytes"
        measure "$bytes bytes" $((bytes > 10000 ? KEYS / 20 : KEYS)) "$bytes"
        say "$bytes bytes: largest node $(resident) MB resident"
        stop_clusters
    done
    table values
}

part_clusters() {
    for count in 1 3 6; do
        start_clusters "$count" 3
        fill "$KEYS" 100
        measure "$count" "$KEYS" 100
        if [ "$count" -gt 1 ]; then measure "$count, so many for each" "$KEYS" 100 "$count"; fi
        stop_clusters
    done
    table clusters
}

# The node that leads cluster 1, by its place among KV_PIDS.
leader() {
    for asked in 1 2 3; do
        if try GET "http://$(kv_http 1 "$asked")/cluster/metrics"; then
            LEADER=$(number current_leader)
            if [ -n "$LEADER" ]; then return 0; fi
        fi
    done
    return 1
}

pid_of() { printf '%s' "$KV_PIDS" | cut -d ',' -f "$1"; }

part_follower() {
    start_clusters 1 3
    fill "$KEYS" 100
    measure 'all awake' "$KEYS" 100
    leader
    follower=$(pid_of $((LEADER % 3 + 1)))
    kill -STOP "$follower"
    measure 'one follower asleep' "$KEYS" 100
    kill -CONT "$follower"
    table follower
    note "Largest node: $(resident) MB resident."
    stop_clusters
}

part_failover() {
    start_clusters 1 3
    fill 1000 100
    : >"$RESULTS/$PART.md"
    kill_leaders 'while nothing is written'
    start load "$BIN/client" bench --nodes-file "$WORK/nodes.json" --workload write --clients 16 \
        --keys 1000 --value-bytes 100 --seconds 3600
    load=$PID
    kill_leaders 'while 16 tasks write'
    if gone "$load"; then fail "the load ended early: $(tail -n 1 "$WORK/load.err")"; fi
    stop "$load"
    stop_clusters
}

# kill_leaders WHEN: so many trials, one after the other; notes how long a new write through another node
# takes.
kill_leaders() {
    trial=1
    : >"$WORK/trials"
    while [ "$trial" -le "$TRIALS" ]; do
        wait_until "$SOON_S" 'a leader' leader
        dead=$LEADER
        other=$((dead % 3 + 1))
        began=$(now_ms)
        stop_hard "$(pid_of "$dead")"
        # Any node takes a write and passes it on; a refusal is safe to repeat.
        until [ "$(curl -q -s -g --noproxy '*' --max-time 1 -o "$WORK/body" -w '%{http_code}' -X PUT \
            --data-binary v "http://$(kv_http 1 "$other")/v1/kv/failover")" = 200 ]; do
            if [ $(($(now_ms) - began)) -gt 20000 ]; then fail 'no write within 20 s'; fi
        done
        echo $(($(now_ms) - began)) >>"$WORK/trials"
        start_node 1 "$dead"
        KV_PIDS=$(printf '%s' "$KV_PIDS" | awk -F , -v OFS=, -v n="$dead" -v p="$PID" '{ $n = p; print }')
        for node in 1 2 3; do
            wait_until "$SOON_S" "node $node to be ready" is_ready "$node"
        done
        trial=$((trial + 1))
    done
    note "$TRIALS leaders killed $1; until the next acknowledged write: median $(sort -n "$WORK/trials" \
        | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }') ms, worst $(sort -n "$WORK/trials" | tail -n 1) ms."
}

is_ready() { try GET "http://$(kv_http 1 "$1")/readyz" && [ "$STATUS" = 200 ]; }

part_restart() {
    start_clusters 1 1
    fill $((GIB * 16384)) 65536
    size=$(du -sm "$WORK/c1-1-db" | cut -f 1)
    : >"$RESULTS/$PART.md"
    for how in 'kill -9' 'a clean stop'; do
        bench --workload write --clients 16 --keys 100000 --seconds 5 --warmup-seconds 0
        case $how in
        kill*) stop_hard "$KV_PIDS" ;;
        *) stop "$KV_PIDS" ;;
        esac
        began=$(now_ms)
        start_node 1 1
        KV_PIDS=$PID
        ready=$(($(now_ms) - began))
        wait_until "$SOON_S" 'it to serve' is_ready 1
        note "$size MB on disk, after $how: accepts after $ready ms, serves after $(($(now_ms) - began)) ms."
    done
    stop_clusters
}

part_steady() {
    start_clusters 1 3
    fill "$KEYS" 100
    : >"$RESULTS/$PART.md"
    bench --workload write --clients 64 --keys 1000000 --seconds 10 --warmup-seconds 2 --threads 2
    first=$(decimal '"throughput":')
    bench --workload write --clients 64 --keys 1000000 --seconds "$STEADY_S" --warmup-seconds 0 --threads 2
    last=$(decimal '"throughput":')
    longest=$(printf '%s\n' "$BODY" | sed 's/"by_operation.*//' | sed -n 's/.*"max":\([0-9.]*\).*/\1/p')
    stalls=$(cat "$WORK"/c1-*-db/db/LOG* | grep -ciE 'stall|stopping writes' || true)
    note "$STEADY_S s of writes by 64 clients: $(number operations) writes, throughput $(echo "$last $first" \
        | awk '{ printf "%.2f", $1 / $2 }') of the first 10 s, the longest $((longest / 1000)) ms," \
        "$stalls write stalls, largest node $(resident) MB resident."
    stop_clusters
}

PARTS='keys sizes clusters follower failover restart steady'
# Splitting the list is meant.
# shellcheck disable=SC2086
if [ $# = 0 ]; then set -- $PARTS; fi
for PART in "$@"; do
    case " $PARTS " in
    *" $PART "*) ;;
    *) fail "unknown part: $PART; see --help" ;;
    esac
done

begin
title 'How the store takes more'
sh scripts/setup.sh
cargo build --release --bins
TARGET=$(target_dir)
BIN=$TARGET/release
RESULTS=$TARGET/scale
mkdir -p "$RESULTS"
for PART in "$@"; do
    step "$PART"
    ROWS=$WORK/rows
    : >"$ROWS"
    "part_$PART"
done
say "results: $RESULTS"
