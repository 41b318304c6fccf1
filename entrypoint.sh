#!/usr/bin/env bash
# The container's entrypoint: platform → DATA_DIR → health server → exec gateway. Runs outside a container too.
# The working directory stays as it is: .env is read from there, here and by the gateway.
set -euo pipefail
trap 'exit 0' TERM INT # as PID 1 we would not even notice them; the gateway, exec'ed, brings handlers of its own
here=$(readlink -f -- "${BASH_SOURCE[0]}")
here=${here%/*}
if [[ -x $here/.venv/bin/python ]]; then python=$here/.venv/bin/python; else python=python3; fi

declare -A dotenv=() value=()
read_dotenv() { # plain KEY=VALUE lines; the gateway reads the file by itself
    local line text pattern='^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=[[:space:]]*(.*)$'
    while IFS= read -r line || [[ -n $line ]]; do
        [[ ${line%$'\r'} =~ $pattern ]] || continue
        text=${BASH_REMATCH[3]}
        case $text in
            \"*\"*) text=${text#\"} text=${text%%\"*} ;;
            \'*\'*) text=${text#\'} text=${text%%\'*} ;;
            \#*) text='' ;;
            *) text=${text%%[[:space:]]#*} ;;
        esac
        dotenv[${BASH_REMATCH[2]}]=$text
    done <.env
}

setting() { # setting NAME [DEFAULT] → value[NAME], trimmed: the real variable, else that of .env; empty counts as unset
    local text=${!1-${dotenv[$1]-}}
    text=${text#"${text%%[![:space:]]*}"} text=${text%"${text##*[![:space:]]}"}
    value[$1]=${text:-${2-}}
}

detect_data_dir() { # the image holds an empty /data, so that one comes last
    local dir
    for dir in /runpod-volume /workspace /data; do [[ ! -d $dir ]] || break; done
    setting DATA_DIR "$dir"
}

start_health_server() {
    local base private options=(--with-parent $$)
    setting STATE_FILE
    if [[ -z ${value[STATE_FILE]} ]]; then
        for base in /dev/shm "${TMPDIR:-/tmp}"; do
            private=$(mktemp -d "$base/corral.XXXXXXXX" 2>/dev/null) || continue
            value[STATE_FILE]=$private/state.json
            options+=(--own-state) # the health server outlives the gateway by a moment, so it cleans up
            break
        done
    fi
    export STATE_FILE=${value[STATE_FILE]}
    # Also where an operator named the file: what an earlier life left in it must not pass for news.
    printf '{"status":"starting","since":%s,"detail":"starting"}' "${EPOCHREALTIME/,/.}" 2>/dev/null >"$STATE_FILE" || true
    PORT_HEALTH=${value[PORT_HEALTH]} HOST=${value[HOST]} HEALTH_MODE=${value[HEALTH_MODE]} \
        HEALTH_STALE_SECONDS=${value[HEALTH_STALE_SECONDS]} "$python" -I -S "$here/health/__main__.py" "${options[@]}" &
}

boot_log=/dev/null
open_boot_log() { # one file a boot, the last twenty are kept; no place to write is no reason to stop
    local dir=${value[DATA_DIR]}/logs/_boot instance=${RUNPOD_POD_ID:-${HOSTNAME:-local}} name logs
    instance=${instance//[^A-Za-z0-9_-]/-}
    printf -v name '%(%Y%m%d_%H%M%S)T_boot_%s.log' -1 "${instance:0:64}"
    if { mkdir -p -- "$dir" && : >>"$dir/$name" && printf '%s\n' "$name" >"$dir/latest.txt"; } 2>/dev/null; then
        boot_log=$dir/$name
        logs=("$dir"/*_boot_*.log) # sorted by time, as their names begin with it
        if ((${#logs[@]} > 20)); then rm -f -- "${logs[@]:0:${#logs[@]}-20}" 2>/dev/null || true; fi
    else
        log warning "no boot log: $dir cannot be written"
    fi
}

log() { # log LEVEL MESSAGE, shaped like the gateway's lines
    local now=$EPOCHREALTIME time line text=${2//\\/\\\\}
    TZ=UTC0 printf -v time "%(%Y-%m-%dT%H:%M:%S)T.${now: -6:3}Z" "${now%[.,]*}"
    line='"request_id": null, "key_id": null, "model": null, "logger": "boot"'
    if [[ ${value[LOG_FORMAT],,} == json ]]; then
        line="{\"time\": \"$time\", \"level\": \"$1\", $line, \"message\": \"${text//\"/\\\"}\"}"
    else printf -v line '%s %-7s %s' "$time" "${1^^}" "$2"; fi
    printf '%s\n' "$line" >&2
    printf '%s\n' "$line" 2>/dev/null >>"$boot_log" || true
}

show_environment() { # masked in doubt: by the name, as userinfo of a URL, or where a value looks like a key
    env -0 | sort -z | sed -zE -e '/^[^=]*=(true|false)?$/Ib' \
        -e 's/^([^=]*(KEY|TOKEN|SECRET|PASS|CRED|AUTH|PRIVATE|COOKIE|SIGNATURE|_PWD|_DSN)[^=]*)=.*/\1=***/I' \
        -e 's#://[^[:space:]]*@#://***@#g' \
        -e 's/((key|token|secret|password|passwd|sig)[^=[:space:]]*[=[:space:]]+)[^[:space:]&]+/\1***/Ig' \
        -e 's/\b(sk|hf|rpa|gh[a-z]|xox[a-z])([-_])[A-Za-z0-9_-]{8,}/\1\2***/g' | tr '\0' '\n'
}

if [[ -f .env && -r .env ]]; then read_dotenv; fi
detect_data_dir
export DATA_DIR=${value[DATA_DIR]} PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
if [[ ${1-} == corral ]]; then shift && set -- "${@:---help}"; fi # `docker run IMAGE corral keys …` does what one means
if [[ ${0##*/} == corral || ${1-healthcheck} != healthcheck ]]; then exec "$python" -P -m gateway "$@"; fi

setting WORKER_MODE http
case ${value[WORKER_MODE],,} in
    http) command=(serve) ;;
    nats | runpod) command=(worker "${value[WORKER_MODE],,}") ;;
    *) echo "WORKER_MODE='${value[WORKER_MODE]}': must be one of http, nats, runpod" >&2 && exit 2 ;;
esac
for name in GATEWAY_PORT RUNPOD_{POD,ENDPOINT}_ID HOST HEALTH_{MODE,STALE_SECONDS} DEBUG_SHELL; do setting "$name"; done
setting LOG_FORMAT && setting PORT_HEALTH 8001 && setting PORT "${value[GATEWAY_PORT]:-8000}" # deprecated, as the gateway says
if [[ -n ${value[RUNPOD_POD_ID]}${value[RUNPOD_ENDPOINT_ID]} ]]; then setting PORT_HEALTH "${value[PORT]}"; fi
for name in PORT{,_HEALTH}; do [[ ! ${value[$name]} =~ ^0+([0-9]+)$ ]] || value[$name]=${BASH_REMATCH[1]}; done # 08001 is 8001
if (($#)); then . "$here/health/check.sh"; fi
# On a port of its own the gateway answers /ping itself; a worker listens nowhere.
if [[ ${command[0]} == worker || ${value[PORT_HEALTH]} != "${value[PORT]}" ]]; then start_health_server; fi

open_boot_log
log info "boot: ${command[*]}, data_dir=$DATA_DIR port=${value[PORT]} port_health=${value[PORT_HEALTH]}"
if [[ -n ${value[STATE_FILE]+set} && ! -w $STATE_FILE ]]; then log warning "STATE_FILE=$STATE_FILE cannot be written"; fi
if [[ ${value[DEBUG_SHELL],,} =~ ^(true|1|yes|on)$ ]]; then
    show_environment
    log info "DEBUG_SHELL: holding the container until SIGTERM"
    sleep infinity & hold=$!
    trap 'kill "$hold"; exit 0' TERM INT
    wait
fi
exec "$python" -P -m gateway "${command[@]}"
