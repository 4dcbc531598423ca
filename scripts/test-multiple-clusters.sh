#!/bin/sh
# The story of three clusters: the ring spreads the keys, any node takes any key, clients that know
# the ring go straight to the owner, a fourth cluster joins and leaves while a client writes, and
# everything is still there after a restart. Every answer is checked. See lib.sh.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh
help_if_asked "$@"

KEYS=90
CLUSTERS=3
NODES=3
HTTP_BASE=21100
RPC_BASE=22100
# How long and how much the client writes at most while the ring changes.
WRITER_S=120
WRITES_MAX=20000
# How long a change of the ring may take.
CHANGE_S=60
# The epoch of the ring in force.
EPOCH=1

# http CLUSTER NODE: an address, both counted from 1.
http() { printf '%s:%d' "$HOST" $((HTTP_BASE + 10 * $1 + $2)); }

# pick MAX: sets PICKED to a number from 1 to MAX that nobody chose; RANDOM_STATE is the seed.
pick() {
    RANDOM_STATE=$(((RANDOM_STATE * 1103515245 + 12345) % 2147483648))
    PICKED=$((RANDOM_STATE / 65536 % $1 + 1))
}

start_clusters() {
    start admin "$BIN/admin" --config "$WORK/Config.toml"
    ADMIN=$PID
    wait_ready admin "$ADMIN" 120
}

stop_clusters() {
    stop "$ADMIN"
    expect_eq 'exit code of admin' 0 "$EXIT_CODE"
    if try GET "http://$(http 1 1)/livez"; then
        fail "after the stop: expected no answer from $(http 1 1), found $STATUS"
    fi
}

# Condition for wait_until: every node answers and every cluster has a leader.
healthy() {
    code=0
    "$BIN/admin" status --nodes-file "$NODES_FILE" >"$WORK/status" 2>"$WORK/out" || code=$?
    reachable=$(grep -c ' yes$' "$WORK/status" || true)
    leaders=$(grep -c ' leader ' "$WORK/status" || true)
    FOUND="exit code $code, $reachable nodes reachable, $leaders leaders"
    [ "$FOUND" = 'exit code 0, 9 nodes reachable, 3 leaders' ]
}

check_status() {
    wait_until "$SOON_S" 'admin status: 9 nodes reachable, 3 leaders' healthy
    show "$WORK/status"
    ok "admin status: $FOUND"
}

# check_rings CLUSTER...: these live by the same ring as c1.
check_rings() {
    request GET "http://$(http 1 1)/v1/ring"
    ring=$BODY
    expect_eq 'ring epoch on c1' "$EPOCH" "$(number epoch)"
    for cluster in "$@"; do
        request GET "http://$(http "$cluster" 3)/v1/ring"
        expect_eq_quietly "the ring on c$cluster" "$ring" "$BODY"
    done
    ok 'all clusters live by the same ring'
}

# Reads every key through a random node of a cluster that does not own it.
read_back() {
    while read -r key owner; do
        pick 2
        cluster=$(((owner - 1 + PICKED) % CLUSTERS + 1))
        pick "$NODES"
        patiently GET "http://$(http "$cluster" "$PICKED")/v1/kv/$key"
        expect_eq_quietly "$key, owned by c$owner, read through c$cluster" \
            "200 value of $key" "$STATUS $BODY"
    done <"$WORK/owners"
    ok "$KEYS keys read back, each through a node of another cluster"
}

# Writes one key after the other through random nodes until it is told to stop, and notes which were
# acknowledged. Runs in the background with a directory of its own.
keep_writing() {
    acknowledged=$WORK/acknowledged
    WORK=$WORK/writer
    mkdir "$WORK"
    end=$(($(date +%s) + WRITER_S))
    number=1
    while [ "$number" -le "$WRITES_MAX" ] && [ ! -e "$WORK/stop" ] && [ "$(date +%s)" -lt "$end" ]; do
        pick 3
        cluster=$PICKED
        pick "$NODES"
        put "http://$(http "$cluster" "$PICKED")/v1/kv/live:$number" "value of live:$number"
        if [ "$STATUS" = 200 ]; then
            printf 'live:%d\n' "$number" >>"$acknowledged"
        else
            printf 'live:%d %s %s\n' "$number" "$STATUS" "$BODY" >>"$WORK/refused"
        fi
        number=$((number + 1))
    done
}

acknowledged() { wc -l <"$WORK/acknowledged" | tr -d ' '; }

# Condition for wait_until: so many writes have been acknowledged.
has_written() {
    FOUND="$(acknowledged) writes"
    [ "$(acknowledged)" -ge "$1" ]
}

# change WHAT ARGUMENT...: runs `admin cluster ARGUMENT...` to its end, and shows how far it was.
change() {
    change_what=$1
    shift
    change_before=$(acknowledged)
    : >"$WORK/progress"
    change_name=change-$1
    start "$change_name" "$BIN/admin" cluster "$@" --nodes-file "$NODES_FILE"
    change_pid=$PID
    change_end=$(($(date +%s) + CHANGE_S))
    while running "$change_pid"; do
        if [ "$(date +%s)" -ge "$change_end" ]; then fail "$change_what: expected to end within $CHANGE_S s"; fi
        "$BIN/admin" migration status --nodes-file "$NODES_FILE" >"$WORK/progress.new" 2>&1 || true
        # The fullest of all answers is the one to show.
        if [ "$(wc -l <"$WORK/progress.new")" -gt "$(wc -l <"$WORK/progress")" ]; then
            mv "$WORK/progress.new" "$WORK/progress"
        fi
        sleep 0.2
    done
    reap "$change_pid"
    show "$WORK/progress"
    show "$WORK/$change_name.err"
    show "$WORK/$change_name.out"
    if [ "$EXIT_CODE" -ne 0 ]; then fail "$change_what: expected exit code 0, found $EXIT_CODE"; fi
    EPOCH=$((EPOCH + 1))
    change_writes=$(($(acknowledged) - change_before))
    if [ "$change_writes" -eq 0 ]; then fail "$change_what: expected writes meanwhile, found none"; fi
    ok "$change_what; $change_writes writes were acknowledged meanwhile"
}

# count_kept CLUSTERS: reads back every acknowledged write through the nodes of so many clusters in
# turn, and counts.
count_kept() {
    cp "$WORK/acknowledged" "$WORK/to-read"
    while read -r key; do
        number=$((${number:-0} + 1))
        printf 'url = "http://%s/v1/kv/%s"\n' "$(http $((number % $1 + 1)) $((number % NODES + 1)))" "$key"
    done <"$WORK/to-read" >"$WORK/urls"
    # One program for all of them; each value is one line.
    curl -q -sS -g --noproxy '*' --max-time "$CHANGE_S" -K "$WORK/urls" -w '\n' >"$WORK/values" 2>"$WORK/curl-error" ||
        fail "reading back: expected answers, found $(cat "$WORK/curl-error")"
    sed 's/^/value of /' "$WORK/to-read" >"$WORK/expected"
    count=$(wc -l <"$WORK/to-read" | tr -d ' ')
    kept=$(paste -d '|' "$WORK/expected" "$WORK/values" | awk -F '|' '$1 == $2' | wc -l | tr -d ' ')
    say "acknowledged  $count"
    say "read back     $kept"
    expect_eq 'lost' 0 $((count - kept))
}

begin
title 'Three clusters of three nodes, one ring'
build
NODES_FILE=$WORK/nodes.json
ports=''
for cluster in 1 2 3 4; do
    for node in 1 2 3; do
        offset=$((10 * cluster + node))
        ports="$ports $((HTTP_BASE + offset)) $((RPC_BASE + offset))"
    done
done
# Splitting the list of ports is meant.
# shellcheck disable=SC2086
claim_ports $ports

step 'Start three clusters with admin'
cat >"$WORK/Config.toml" <<TOML
num_clusters = $CLUSTERS
nodes_per_cluster = $NODES
host = "$HOST"
http_base_port = $HTTP_BASE
rpc_base_port = $RPC_BASE
data_dir = "$WORK/data"
nodes_file = "$NODES_FILE"
TOML
start_clusters
show "$WORK/admin.out"
expect_contains 'the nodes file lists every cluster' "[\"$(http 3 1)\"," "$(cat "$NODES_FILE")"

step 'Every cluster has a leader'
check_status

step 'The ring'
"$BIN/admin" ring show --nodes-file "$NODES_FILE" >"$WORK/ring" || fail 'admin ring show: expected exit code 0'
show "$WORK/ring"
check_rings 2 3

RANDOM_STATE=$(awk 'BEGIN { srand(); printf "%d", rand() * 2147483647 }')
step "Write $KEYS keys through random nodes (seed $RANDOM_STATE)"
keys=''
number=1
while [ "$number" -le "$KEYS" ]; do
    key=$(printf 'user:%04d' "$number")
    pick "$CLUSTERS"
    cluster=$PICKED
    pick "$NODES"
    put "http://$(http "$cluster" "$PICKED")/v1/kv/$key" "value of $key"
    expect_status "PUT $key through node $PICKED of c$cluster" 200
    keys="$keys $key"
    number=$((number + 1))
done
ok "$KEYS writes acknowledged"

step 'Who owns what'
# Splitting the list of keys is meant.
# shellcheck disable=SC2086
"$BIN/client" --nodes-file "$NODES_FILE" route $keys >"$WORK/routes" || fail 'client route: expected exit code 0'
# Each line: key, cluster, nodes.
awk '{ sub(/^c/, "", $2); print $1, $2 }' "$WORK/routes" >"$WORK/owners"
expect_eq 'keys with an owner' "$KEYS" "$(grep -c '^user:[0-9]* [123]$' "$WORK/owners" || true)"
for cluster in 1 2 3; do
    count=$(grep -c " $cluster\$" "$WORK/owners" || true)
    if [ "$count" -eq 0 ]; then fail "keys of c$cluster: expected some, found none"; fi
    bar=$(awk -v n="$count" 'BEGIN { while (n-- > 0) printf "#" }')
    ok "c$cluster owns $(printf '%3d' "$count")  $DIM$bar$PLAIN"
done

step 'Read back'
read_back

step 'Clients that know the ring'
read -r key owner <"$WORK/owners"
other=$((owner % CLUSTERS + 1))
request GET "http://$(http "$other" 1)/v1/kv/$key" -H 'Kv-Routing: direct'
expect_eq "$key asked of c$other directly" '421 WRONG_CLUSTER' "$STATUS $(word code)"
expect_contains "and the answer names c$owner" "$(http "$owner" 1)" "$BODY"
request GET "http://$(http "$owner" 2)/v1/kv/$key?consistency=stale" -H 'Kv-Routing: direct'
expect_eq "$key asked of c$owner directly, stale" "200 value of $key" "$STATUS $BODY"
found=$("$BIN/client" --nodes-file "$NODES_FILE" get "$key") || fail "client get $key: expected exit code 0, found $?"
expect_eq "client get $key" "value of $key" "$found"
code=0
"$BIN/client" --nodes-file "$NODES_FILE" get nobody-wrote-this >"$WORK/out" 2>&1 || code=$?
expect_eq 'client get of an absent key: exit code' 3 "$code"
code=0
"$BIN/admin" ring install --weights 1,2,3 --nodes-file "$NODES_FILE" >"$WORK/out" 2>&1 || code=$?
expect_eq 'a second, different first ring: exit code' 1 "$code"
say "$(cat "$WORK/out")"
check_rings 2 3

step 'A client writes all the time'
: >"$WORK/acknowledged"
keep_writing &
WRITER=$!
PIDS="$PIDS $WRITER"
wait_until "$SOON_S" '20 writes' has_written 20
ok "it has written $(acknowledged) keys so far"

step 'A fourth cluster joins'
nodes=''
for node in 1 2 3; do
    rpc=$HOST:$((RPC_BASE + 40 + node))
    start "c4-n$node" "$BIN/raft-kv" --id "$node" --cluster c4 --http-addr "$(http 4 "$node")" \
        --rpc-addr "$rpc" --data-dir "$WORK/data/c4-n$node"
    wait_ready "c4-n$node" "$PID"
    eval "FOURTH_$node=$PID"
    nodes="$nodes${nodes:+,}$(http 4 "$node")/$rpc"
done
"$BIN/admin" rebalance --dry-run --add c4:1 --nodes-file "$NODES_FILE" >"$WORK/outlook" ||
    fail 'admin rebalance --dry-run: expected exit code 0'
show "$WORK/outlook"
change 'c4 has joined' add c4 --nodes "$nodes"
check_rings 2 3 4
count_kept 4

step 'It leaves again'
change 'c4 has left' remove c4
check_rings 2 3
for node in 1 2 3; do
    eval "stop \"\$FOURTH_$node\""
    expect_eq_quietly "exit code of node $node of c4" 0 "$EXIT_CODE"
done
ok 'its nodes are stopped'

step 'What the client wrote is still there'
before=$(acknowledged)
wait_until "$SOON_S" '20 more writes' has_written $((before + 20))
: >"$WORK/writer/stop"
wait_until "$SOON_S" 'the client to stop' gone "$WRITER"
reap "$WRITER"
expect_eq 'exit code of the client' 0 "$EXIT_CODE"
if [ -e "$WORK/writer/refused" ]; then
    fail "every write: expected to be acknowledged, found $(head -n 1 "$WORK/writer/refused")"
fi
count_kept 3
read_back

step 'Stop everything'
stop_clusters
code=0
"$BIN/admin" status --nodes-file "$NODES_FILE" >"$WORK/status" 2>"$WORK/out" || code=$?
expect_eq 'exit code of admin status with nobody there' 1 "$code"

step 'Start again on the same data'
start_clusters
check_status
check_rings 2 3
read_back
key=$(printf 'user:%04d' "$KEYS")
put "http://$(http 2 2)/v1/kv/$key" 'a new value'
expect_status "PUT $key after the restart" 200
request GET "http://$(http 3 3)/v1/kv/$key"
expect_eq "$key after the restart" '200 a new value' "$STATUS $BODY"

step 'Stop'
stop_clusters

the_end
