# shellcheck shell=sh
# What the scripts share: telling a story, checking every answer, cleaning up.
#
# A script sources this file after `set -eu` and then calls `begin`. From there on:
# - WORK is a temporary directory, and everything that the script leaves on disk is in it;
# - every process is started with `start`, and only those processes are ever stopped;
# - on exit, also after a failed check or a signal, the processes are stopped and WORK is removed; after
#   a signal one line says so.
# A check that does not hold ends the script with one line: what was expected, and what was found.
# VERBOSE=1 prints the ends of the processes' logs before that line; CI does so too.

HOST=127.0.0.1
# How long one request may take: more than the nodes' own request deadline of 10 s.
REQUEST_TIMEOUT_S=15
# How long a process may take to stop before it is killed.
STOP_TIMEOUT_S=20
# How long to wait for what takes an election or less.
SOON_S=30

# ---------------------------------------------------------------------------- telling

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    BOLD=$(printf '\033[1m') GREEN=$(printf '\033[32m') RED=$(printf '\033[31m')
    DIM=$(printf '\033[2m') PLAIN=$(printf '\033[0m')
else
    BOLD='' GREEN='' RED='' DIM='' PLAIN=''
fi

STEP=0
CHECKS=0

title() { printf '\n%s%s%s\n' "$BOLD" "$*" "$PLAIN"; }

step() {
    STEP=$((STEP + 1))
    printf '\n%s%2d. %s%s\n' "$BOLD" "$STEP" "$*" "$PLAIN"
}

say() { printf '    %s\n' "$*"; }

# A check that held.
ok() {
    CHECKS=$((CHECKS + 1))
    printf '    %sok%s  %s\n' "$GREEN" "$PLAIN" "$*"
}

# Shows a file's lines as part of the story.
show() { sed "s/^/    $DIM| $PLAIN/" "$1"; }

fail() {
    show_logs
    printf '%sFAILED%s  %s\n' "$RED" "$PLAIN" "$*" >&2
    exit 1
}

show_logs() {
    if [ -z "${VERBOSE:-}${CI:-}" ] || [ -z "${WORK:-}" ]; then return 0; fi
    for log in "$WORK"/*.err; do
        if [ -s "$log" ]; then
            printf '%s\n' "--- the end of ${log##*/}" >&2
            tail -n 20 "$log" >&2
        fi
    done
}

the_end() {
    printf '\n%sAll %d checks held.%s\n' "$BOLD$GREEN" "$CHECKS" "$PLAIN"
}

# ---------------------------------------------------------------------------- checking

# expect_eq WHAT EXPECTED FOUND
expect_eq() {
    if [ "$2" != "$3" ]; then fail "$1: expected '$2', found '$3'"; fi
    ok "$1: $(brief "$3")"
}

# The same without a line for success, for checks in a loop.
expect_eq_quietly() {
    if [ "$2" != "$3" ]; then fail "$1: expected '$2', found '$3'"; fi
    CHECKS=$((CHECKS + 1))
}

# expect_status WHAT STATUS: the status of the last request.
expect_status() {
    if [ "$STATUS" != "$2" ]; then fail "$1: expected status $2, found $STATUS with $(brief "$BODY")"; fi
    CHECKS=$((CHECKS + 1))
}

# expect_contains WHAT PART TEXT
expect_contains() {
    case "$3" in
    *"$2"*) ok "$1" ;;
    *) fail "$1: expected something with '$2', found '$(brief "$3")'" ;;
    esac
}

brief() {
    if [ "${#1}" -gt 300 ]; then printf '%.300s...' "$1"; else printf '%s' "$1"; fi
}

# wait_until SECONDS WHAT COMMAND...: repeats COMMAND until it succeeds. The command says in FOUND
# what it saw, for the message when it never does.
wait_until() {
    wait_s=$1 wait_what=$2
    shift 2
    wait_end=$(($(date +%s) + wait_s))
    FOUND='nothing'
    until "$@"; do
        if [ "$(date +%s)" -ge "$wait_end" ]; then
            fail "$wait_what: expected within $wait_s s, found $(brief "$FOUND")"
        fi
        sleep 0.1
    done
}

# ---------------------------------------------------------------------------- HTTP

# try METHOD URL [CURL OPTION...]: sets STATUS and BODY; fails when there is no answer.
try() {
    try_method=$1 try_url=$2
    shift 2
    : >"$WORK/body"
    # -q and --noproxy: neither a user's curlrc nor a proxy has a say in talking to this machine.
    if STATUS=$(curl -q -sS -g --noproxy '*' --max-time "$REQUEST_TIMEOUT_S" --path-as-is \
        -o "$WORK/body" -w '%{http_code}' -X "$try_method" "$@" "$try_url" 2>"$WORK/curl-error"); then
        BODY=$(cat "$WORK/body")
    else
        STATUS='none' BODY=$(cat "$WORK/curl-error")
        return 1
    fi
}

# The same, but no answer is a failed check.
request() {
    if ! try "$@"; then fail "$1 $2: expected an answer, found $BODY"; fi
}

# patiently METHOD URL [CURL OPTION...]: a request that waits out an election: 503 is asked again.
# What is sent here is the same each time, so that doing it twice does no harm.
patiently() {
    patiently_end=$(($(date +%s) + SOON_S))
    request "$@"
    while [ "$STATUS" = 503 ] && [ "$(date +%s)" -lt "$patiently_end" ]; do
        sleep 0.1
        request "$@"
    done
}

# post_json URL JSON
post_json() { patiently POST "$1" -H 'Content-Type: application/json' --data-binary "$2"; }

# put URL VALUE [CURL OPTION...]
put() {
    put_url=$1 put_value=$2
    shift 2
    patiently PUT "$put_url" "$@" --data-binary "$put_value"
}

# number NAME: a number out of BODY, which is compact JSON; nothing when it is null or absent.
number() { printf '%s\n' "$BODY" | sed -n "s/.*\"$1\":\([0-9][0-9]*\).*/\1/p"; }

# list NAME: a list of numbers out of BODY, as it stands between its brackets.
list() { printf '%s\n' "$BODY" | sed -n "s/.*\"$1\":\[\([0-9,]*\)\].*/\1/p"; }

# word NAME: a string out of BODY.
word() { printf '%s\n' "$BODY" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

# ---------------------------------------------------------------------------- processes

PIDS=''

# start NAME COMMAND...: runs it in the background with its output in WORK/NAME.out and .err, and
# sets PID.
start() {
    start_name=$1
    shift
    # Emptied here and not only by the background process, which may be slow to begin.
    : >"$WORK/$start_name.out"
    "$@" </dev/null >>"$WORK/$start_name.out" 2>>"$WORK/$start_name.err" &
    PID=$!
    PIDS="$PIDS $PID"
}

running() { kill -0 "$1" 2>/dev/null; }

gone() { ! running "$1"; }

# stop PID: SIGTERM, then waits; sets EXIT_CODE. Kills what does not stop in time.
stop() {
    kill -TERM "$1" 2>/dev/null || true
    stop_end=$(($(date +%s) + STOP_TIMEOUT_S))
    while running "$1"; do
        if [ "$(date +%s)" -ge "$stop_end" ]; then
            kill -KILL "$1" 2>/dev/null || true
            break
        fi
        sleep 0.05
    done
    reap "$1"
}

# stop_hard PID: kill -9, as a crash or the kernel would.
stop_hard() {
    kill -KILL "$1"
    reap "$1"
}

# Waits for a process that was told to stop, and forgets it.
reap() {
    EXIT_CODE=0
    wait "$1" 2>/dev/null || EXIT_CODE=$?
    reap_left=''
    for reap_pid in $PIDS; do
        if [ "$reap_pid" != "$1" ]; then reap_left="$reap_left $reap_pid"; fi
    done
    PIDS=$reap_left
}

# wait_ready NAME PID: until a line that starts with "ready" is on its standard output.
wait_ready() {
    wait_until "${3:-$SOON_S}" "$1 to be ready" ready_or_dead "$1" "$2"
}

ready_or_dead() {
    if grep -q '^ready' "$WORK/$1.out"; then return 0; fi
    FOUND=$(tail -n 1 "$WORK/$1.err" 2>/dev/null)
    if gone "$2"; then
        reap "$2"
        fail "$1: expected it to be ready, found that it ended with exit code $EXIT_CODE: $FOUND"
    fi
    return 1
}

# claim_ports PORT...: all of them must be free.
claim_ports() {
    for port in "$@"; do
        code=0
        curl -q -s -o "$WORK/body" --noproxy '*' --connect-timeout 1 --max-time 1 \
            "http://$HOST:$port/" 2>/dev/null || code=$?
        # 7: nobody accepts connections there.
        if [ "$code" -ne 7 ]; then fail "port $port: expected it to be free, found it taken"; fi
    done
}

# ---------------------------------------------------------------------------- beginning and end

# help_if_asked ARGUMENT...: with --help among them, prints the comment at the script's head and ends.
help_if_asked() {
    for argument in "$@"; do
        case $argument in
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/${0##*/}"
            exit 0
            ;;
        esac
    done
}

begin() {
    WORK='' INTERRUPTED=''
    # Signals end the script through `exit`, so that the trap on EXIT runs exactly once.
    trap clean_up EXIT
    trap 'INTERRUPTED=1; exit 129' HUP
    trap 'INTERRUPTED=1; exit 130' INT
    trap 'INTERRUPTED=1; exit 143' TERM
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/distrib-kv.XXXXXX")
}

clean_up() {
    code=$?
    trap - EXIT
    # A second signal must not leave anything behind either.
    trap '' HUP INT TERM
    for pid in $PIDS; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in $PIDS; do stop "$pid"; done
    if [ -n "$WORK" ]; then rm -rf "$WORK"; fi
    if [ -n "$INTERRUPTED" ]; then
        # Nobody may be left to read it, after a hangup for example.
        printf '\n%sINTERRUPTED%s  everything that was started is stopped, and its data is removed\n' \
            "$RED" "$PLAIN" >&2 || true
    fi
    exit "$code"
}

# Builds the binaries as `cargo test` does and sets BIN to where they are; with BIN set already, takes those
# that are there.
build() {
    if [ -n "${BIN:-}" ]; then return; fi
    sh scripts/setup.sh
    cargo build --bins
    # Read by the scripts that source this file.
    # shellcheck disable=SC2034
    BIN=$(target_dir)/debug
}

# Where cargo puts what it builds.
target_dir() {
    found=$(cargo metadata --format-version 1 --no-deps --offline |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
    printf '%s\n' "${found:-target}"
}
