# Sourced by the scripts that run cargo beside a PostgreSQL of their own, which speaks on 127.0.0.1 only.
# Sets `postgres` and `cargo`, the process ids of what runs, empty where it does not. Relies on `script`, what the sourcing
# script calls itself, and `directory`, where everything of the run lies; `stop_cargo` and `stop_postgres` are for its end.

postgres=
cargo=

say() { printf '%s: %s\n' "$script" "$*"; }

fail() {
    local status=$1
    shift
    printf "$script: %s\n" "$@" >&2 # each argument is a line
    exit "$status"
}

# Waits until the process has gone, for at most $2 tenths of a second.
gone() {
    local left=$2
    while kill -0 -- "$1" 2>/dev/null; do
        if ((left-- == 0)); then return 1; fi
        sleep 0.1
    done
}

# Prints the directory of the newest PostgreSQL server binaries, if there are any.
find_postgres() {
    local initdb best='' best_version=-1 version
    for initdb in "$(command -v initdb || true)" /usr/lib/postgresql/*/bin/initdb; do
        [[ -x $initdb && -x ${initdb%/*}/postgres ]] || continue
        version=$("$initdb" --version | sed -E 's/^[^0-9]*([0-9]+).*/\1/')
        if ((version > best_version)); then
            best=${initdb%/*} best_version=$version
        fi
    done
    printf '%s' "$best"
}

# Prints the path of smtp-sink, if there is one.
find_smtp_sink() {
    local path
    for path in "${LAPSED_TEST_SMTP_SINK:-}" "$(command -v smtp-sink || true)" /usr/sbin/smtp-sink; do
        if [[ -x $path ]]; then
            printf '%s' "$path"
            return
        fi
    done
}

# Prints the path of a python3 that reads metrics as Prometheus does, if there is one.
find_python() {
    local path
    for path in "${LAPSED_TEST_PYTHON:-}" "$(command -v python3 || true)" /usr/bin/python3; do
        if [[ -x $path ]] && "$path" -c 'import prometheus_client.openmetrics.parser' 2>/dev/null; then
            printf '%s' "$path"
            return
        fi
    done
}

# Prints the path of Chromium, if there is one.
find_chromium() {
    local path
    for path in "${LAPSED_TEST_CHROMIUM:-}" "$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)"; do
        if [[ -x $path ]]; then
            printf '%s' "$path"
            return
        fi
    done
}

# Stops the PostgreSQL that was started here. SIGQUIT is the immediate shutdown: the data is thrown away, so nothing
# needs to be written.
stop_postgres() {
    [[ -n $postgres ]] || return 0
    kill -QUIT "$postgres" 2>/dev/null
    if ! gone "$postgres" 100; then
        kill -KILL "$postgres" 2>/dev/null
        gone "$postgres" 50 # its own processes notice that and end
    fi
}

# Starts PostgreSQL in $directory/postgres, with the settings that are given as NAME=VALUE; sets `postgres` and
# `postgres_url`. Relies on `binaries`.
start_postgres() {
    local home=$directory/postgres as=() settings=() user password port attempt
    settings=("${@/#/--}")
    mkdir -m 700 "$home"
    password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    printf '%s\n' "$password" >"$home/password"
    if ((EUID == 0)); then # the server refuses to run as root
        user=postgres
        id "$user" >/dev/null 2>&1 || user=nobody
        chown -R "$user:" "$home"
        as=(setpriv "--reuid=$user" "--regid=$(id -g "$user")" --clear-groups)
    fi
    as+=(env -C "$home" LC_ALL=C "HOME=$home")
    # A password over TCP, or any user of this machine could become the server's; the socket lies in a private directory.
    "${as[@]}" "$binaries/initdb" --pgdata="$home/data" --username=postgres --pwfile="$home/password" \
        --auth-local=trust --auth-host=password --encoding=UTF8 --locale=C --no-sync >"$directory/initdb.log" 2>&1 ||
        { cat "$directory/initdb.log" >&2 && fail 1 "initdb failed"; }

    # Ports below the ephemeral range, so that no client of another test sits on one; another program may.
    for attempt in 1 2 3 4 5; do
        port=$((20000 + RANDOM % 12000))
        set -m # a process group of its own: Ctrl-C must not reach it before the tests
        "${as[@]}" "$binaries/postgres" -D "$home/data" -k "$home" -p "$port" -c listen_addresses=127.0.0.1 \
            -c max_connections=200 -c timezone=UTC "${settings[@]}" \
            >"$directory/postgres.log" 2>&1 </dev/null &
        postgres=$!
        disown "$postgres" # or bash comments on its end
        set +m
        # The last line of this file is the state of the server; pg_ctl reads it too.
        for _ in {1..600}; do
            if grep -qs '^ready' "$home/data/postmaster.pid"; then
                postgres_url=postgres://postgres:$password@127.0.0.1:$port/postgres
                say "PostgreSQL $("$binaries/postgres" --version | sed -E 's/^[^0-9]*([^ ]+).*/\1/') on 127.0.0.1:$port"
                return
            fi
            kill -0 "$postgres" 2>/dev/null || break
            sleep 0.1
        done
        if kill -0 "$postgres" 2>/dev/null; then break; fi
        postgres=
        say "PostgreSQL did not start on port $port (attempt $attempt)"
    done
    tail -n 20 "$directory/postgres.log" >&2
    fail 1 "PostgreSQL did not start"
}

# Runs cargo with these arguments. It leads a process group of its own, so that the end of the script reaches all of it;
# temporary files go where they are removed with the rest.
run_cargo() {
    local status=0
    mkdir -m 755 "$directory/tmp"
    set -m
    TMPDIR=$directory/tmp cargo "$@" </dev/null &
    cargo=$!
    set +m
    wait "$cargo" || status=$?
    return "$status"
}

# Stops cargo, what it runs, and the servers that that started.
stop_cargo() {
    if [[ -n $cargo ]] && kill -TERM -- "-$cargo" 2>/dev/null; then
        gone "-$cargo" 50 || kill -KILL -- "-$cargo" 2>/dev/null
    fi
}
