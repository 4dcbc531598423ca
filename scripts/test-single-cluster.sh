#!/bin/sh
# The story of one cluster: three nodes find together, a write is read everywhere, the leader dies,
# the others go on, and it comes back and catches up. Every answer is checked. See lib.sh.
set -eu
cd "$(dirname "$0")/.."
. scripts/lib.sh
help_if_asked "$@"

# http NODE, rpc NODE: the addresses of a node, counted from 1.
http() { printf '%s:2100%s' "$HOST" "$1"; }
rpc() { printf '%s:2200%s' "$HOST" "$1"; }

start_node() {
    start "node-$1" "$BIN/raft-kv" --id "$1" --http-addr "$(http "$1")" --rpc-addr "$(rpc "$1")" \
        --data-dir "$WORK/node-$1-db"
    echo "$PID" >"$WORK/node-$1.pid"
    wait_ready "node-$1" "$PID"
}

pid_of() { cat "$WORK/node-$1.pid"; }

metrics() { request GET "http://$(http "$1")/cluster/metrics"; }

# Conditions for wait_until.

knows_leader() { # NODE: sets LEADER
    try GET "http://$(http "$1")/cluster/metrics" || { FOUND=$BODY; return 1; }
    FOUND="current_leader $(number current_leader)"
    LEADER=$(number current_leader)
    [ -n "$LEADER" ]
}

knows_new_leader() { # NODE OLD
    knows_leader "$1" && [ "$LEADER" != "$2" ]
}

has_voters() { # NODE VOTERS
    try GET "http://$(http "$1")/cluster/metrics" || { FOUND=$BODY; return 1; }
    FOUND="voters [$(list voters)], learners [$(list learners)]"
    [ "$FOUND" = "voters [$2], learners []" ]
}

reads_stale() { # NODE KEY VALUE
    try GET "http://$(http "$1")/v1/kv/$2?consistency=stale" || { FOUND=$BODY; return 1; }
    FOUND="$STATUS $BODY"
    [ "$FOUND" = "200 $3" ]
}

# While an election runs, a write may be refused, or its outcome stay unknown. Writing the same value
# again is harmless here.
writes() { # NODE KEY VALUE
    try PUT "http://$(http "$1")/v1/kv/$2" --data-binary "$3" || { FOUND=$BODY; return 1; }
    FOUND="$STATUS $BODY"
    [ "$STATUS" = 200 ]
}

# read_everywhere KEY VALUE NODE...: linearizable and stale, by both kinds of routes.
read_everywhere() {
    key=$1 value=$2
    shift 2
    for node in "$@"; do
        patiently GET "http://$(http "$node")/v1/kv/$key"
        expect_eq_quietly "linearizable read of $key on node $node" "200 $value" "$STATUS $BODY"
        wait_until "$SOON_S" "stale read of $key on node $node: 200 $value" \
            reads_stale "$node" "$key" "$value"
        post_json "http://$(http "$node")/api/consistent_read" "\"$key\""
        expect_eq_quietly "/api/consistent_read on node $node" "200 \"$value\"" "$STATUS $BODY"
        post_json "http://$(http "$node")/api/read" "\"$key\""
        expect_eq_quietly "/api/read on node $node" "200 \"$value\"" "$STATUS $BODY"
        ok "node $node reads $key = $value, linearizable and stale"
    done
}

begin
title 'One cluster of three nodes'
build
claim_ports 21001 21002 21003 22001 22002 22003

step 'Start three nodes that do not know each other'
for node in 1 2 3; do
    start_node "$node"
    metrics "$node"
    expect_eq "node $node at $(http "$node")" uninitialized "$(word state)"
done
request PUT "http://$(http 1)/v1/kv/early" --data-binary bird
expect_status 'a write before the cluster exists' 503
expect_eq 'a write before the cluster exists' NOT_INITIALIZED "$(word code)"

step 'Node 1 founds the cluster'
post_json "http://$(http 1)/cluster/init" '{}'
expect_status 'init' 200
wait_until "$SOON_S" 'a leader' knows_leader 1
expect_eq 'leader' 1 "$LEADER"
post_json "http://$(http 1)/cluster/init" '{}'
expect_status 'a second init' 409
expect_eq 'a second init' CONFLICT "$(word code)"

step 'Nodes 2 and 3 follow as learners'
for node in 2 3; do
    post_json "http://$(http 1)/cluster/add-learner" "[$node,\"$(http "$node")\",\"$(rpc "$node")\"]"
    expect_status "add-learner $node" 200
done
metrics 1
expect_eq 'voters and learners' '[1] [2,3]' "[$(list voters)] [$(list learners)]"

step 'All three become voters'
post_json "http://$(http 1)/cluster/change-membership" '[1,2,3]'
expect_status 'change-membership' 200
for node in 1 2 3; do
    wait_until "$SOON_S" "node $node to know the voters 1,2,3" has_voters "$node" 1,2,3
    ok "node $node: $FOUND"
done

step 'Write'
post_json "http://$(http 1)/api/write" '{"Set":{"key":"foo","value":"bar"}}'
expect_status '/api/write' 201
ok '/api/write of foo = bar through node 1: 201'
put "http://$(http 1)/v1/kv/color" red
expect_status 'PUT color' 200
first_revision=$(number revision)
put "http://$(http 2)/v1/kv/color" green
expect_status 'PUT color through node 2, a follower' 200
second_revision=$(number revision)
if [ "$second_revision" -le "$first_revision" ]; then
    fail "revision: expected more than $first_revision, found $second_revision"
fi
ok "color = red, then green through a follower: revisions $first_revision and $second_revision"
put "http://$(http 3)/v1/kv/color" blue -H 'If-None-Match: *'
expect_status 'PUT color only if it is absent' 412
ok 'color = blue only if it is absent: refused with 412'

step 'Read on every node'
read_everywhere foo bar 1 2 3
read_everywhere color green 1 2 3
request GET "http://$(http 2)/v1/kv/nothing-here"
expect_eq 'an absent key' '404 NOT_FOUND' "$STATUS $(word code)"
post_json "http://$(http 2)/api/read" '"nothing-here"'
expect_eq 'an absent key, /api/read' '200 null' "$STATUS $BODY"

step 'kill -9 the leader'
wait_until "$SOON_S" 'a leader' knows_leader 1
dead=$LEADER
case $dead in
1) survivors='2 3' ;;
2) survivors='1 3' ;;
*) survivors='1 2' ;;
esac
survivor=${survivors% *}
stop_hard "$(pid_of "$dead")"
say "node $dead led, and is dead; nodes $survivors are left"
if try GET "http://$(http "$dead")/cluster/metrics"; then
    fail "node $dead: expected no answer, found $STATUS $BODY"
fi
wait_until "$SOON_S" 'another leader' knows_new_leader "$survivor" "$dead"
ok "node $LEADER leads"

step 'Write through another node'
wait_until "$SOON_S" "a write through node $survivor" writes "$survivor" color purple
ok "color = purple through node $survivor: $FOUND"
# Splitting the list of nodes is meant.
# shellcheck disable=SC2086
read_everywhere color purple $survivors
# shellcheck disable=SC2086
read_everywhere foo bar $survivors

step "Restart node $dead"
start_node "$dead"
wait_until "$SOON_S" "node $dead to know the voters 1,2,3" has_voters "$dead" 1,2,3
ok "node $dead remembers: $FOUND"
read_everywhere color purple "$dead"
read_everywhere foo bar "$dead"

step 'Stop'
for node in 1 2 3; do
    stop "$(pid_of "$node")"
    expect_eq "exit code of node $node" 0 "$EXIT_CODE"
done

the_end
