# shellcheck shell=bash
# Sourced by the scripts beside it, from the repository's root: the Python environment and the machine's packages.
# Runs in bash 3.2 too, so that macOS's own will do.

say() { printf 'corral: %s\n' "$*" >&2; }
die() { say "$*" && exit 1; }

# usage FILE: that script's leading comment, as the answer to --help (exit 0) or to a wrong argument (exit 2).
usage() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"
    exit "${2-2}"
}

# locked FILE COMMAND…: one process at a time; where flock is missing, it is left to the user.
locked() {
    mkdir -p "$(dirname "$1")"
    if command -v flock >/dev/null; then
        (flock 9 && "${@:2}") 9>"$1"
    else
        "${@:2}"
    fi
}

# debian_packages NAME…: installs the missing ones where that is possible, else says how.
debian_packages() {
    local name missing=()
    command -v dpkg-query >/dev/null || return 0
    for name in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "Debian packages are missing; install them with: sudo apt-get install ${missing[*]}"
    say "installing ${missing[*]} with apt-get …"
    mkdir -p .cache
    locked .cache/apt.lock apt_install "${missing[@]}" >.cache/apt.log 2>&1 && return
    tail -n 20 .cache/apt.log >&2
    die "apt-get could not install ${missing[*]}; see above."
}

policy_rc_d=/usr/sbin/policy-rc.d

# The package lists are fetched only if those at hand do not do. Tests start servers of their own, on ports of their own:
# what a package would start by itself, now or at the next boot, nobody has asked for.
apt_install() (
    install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@")
    forbid_starts
    "${install[@]}" || { apt-get update -qq && "${install[@]}"; } || exit
    command -v systemctl >/dev/null || exit 0
    dpkg -L "$@" | sed -En 's,.*/systemd/system/([^/@]*\.(service|socket|timer))$,\1,p' |
        xargs -r systemctl disable --quiet || true
)

# Until this subshell ends: Debian asks policy-rc.d before it starts a service, and 101 is no. One that is there already
# has the say. Ours allows everything again should we be killed before we can remove it.
forbid_starts() {
    local ours='made by corral'
    if grep -qs "$ours" "$policy_rc_d" && "$policy_rc_d"; then
        rm -f "$policy_rc_d"
    fi
    (set -C && printf '#!/bin/sh\n# %s\nkill -0 %d 2>/dev/null && exit 101\nexit 0\n' "$ours" $$ >"$policy_rc_d") ||
        return 0
    trap 'rm -f "$policy_rc_d"' EXIT
    chmod 755 "$policy_rc_d"
}

# Prints a Python that we support and that can make an environment.
find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

python_or_die() {
    find_python && return
    debian_packages python3 python3-venv >&2
    find_python || die "Python 3.11 or newer with venv is needed; install it with: brew install python (macOS)," \
        "apt-get install python3 python3-venv (Debian 12, Ubuntu 24.04 or newer), dnf install python3 (Fedora)."
}

# environment runtime|dev makes .venv what that lock file says, or finds that it already is; `dev` contains `runtime`.
environment() {
    installed "$1" || locked .cache/venv.lock install "$1" || die "the Python environment could not be made; see above."
}

lock_file() { [ "$1" = dev ] && echo requirements-dev.lock || echo requirements.lock; }

# What .venv was made from stands in it: then nothing is to do, not even offline.
wanted() { echo "$PWD" && cat "$(lock_file "$1")" pyproject.toml; }

installed() {
    [ -x .venv/bin/corral ] || return 1
    wanted "$1" | cmp -s - ".venv/made-from-$1" || { [ "$1" = runtime ] && wanted dev | cmp -s - .venv/made-from-dev; }
}

install() {
    installed "$1" && return
    local python made_in
    made_in=$(cat .venv/made-from-* 2>/dev/null | sed -n 1p) || true
    if ! .venv/bin/python -c 'import pip' 2>/dev/null || [ "${made_in:-$PWD}" != "$PWD" ]; then
        python=$(python_or_die) || return
        say "making .venv with $python …"
        "$python" -m venv --clear .venv || return
    fi
    say "installing $(lock_file "$1") into .venv …"
    rm -f .venv/made-from-*
    pip_install --require-hashes -r "$(lock_file "$1")" && pip_install --no-deps --no-build-isolation -e . || return
    wanted "$1" >".venv/made-from-$1"
}

pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

# What scripts/make_model.py needs, at the versions of the development lock; its other dependencies serve other ends.
gguf_package() {
    .venv/bin/python -c 'import gguf' 2>/dev/null || locked .cache/venv.lock install_gguf
}

install_gguf() {
    pip_install --require-hashes --no-deps -r <(awk '/^[^ #]/ { wanted = /^(gguf|numpy)==/ } wanted' requirements-dev.lock)
}
