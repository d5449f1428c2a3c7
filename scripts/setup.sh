# Sourced by the other scripts: finds a Python, installs what is missing, makes .venv.
# shellcheck shell=bash

export LC_ALL=C.UTF-8
export PIP_DISABLE_PIP_VERSION_CHECK=1
PATH="$PATH:/usr/sbin:/sbin" # mkfs.ext4 and nbd-client live there; a user's PATH may lack it

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "scripts/$(basename "$0")" "$*" >&2
    exit 1
}

# The first Python that is new enough. An older one is named, so that nobody has to guess.
find_python() {
    local candidate found=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 \
        /usr/bin/python3; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        found="$found $("$candidate" -V 2>&1 || true)"
    done
    die "needs Python 3.11 or newer${found:+ (found:$found)}; on Debian 12: apt-get install python3"
}

# need_programs PROGRAM:PACKAGE...  Every program is there afterwards, or one line says what to do.
need_programs() {
    local entry missing=""
    for entry in "$@"; do
        command -v "${entry%%:*}" >/dev/null 2>&1 || missing="$missing ${entry##*:}"
    done
    install_packages $missing
    for entry in "$@"; do
        hash -r
        command -v "${entry%%:*}" >/dev/null 2>&1 ||
            die "${entry%%:*} is missing, and the package ${entry##*:} does not bring it here"
    done
}

# need_guest_kernel  The kernel that tests boot under QEMU: Debian's own for virtual machines. If it
# is not installed, it is only unpacked, into .cache: what is installed, this machine boots next.
need_guest_kernel() {
    local place=.cache/guest-kernel package=linux-image-cloud-amd64 log
    if compgen -G "$place/boot/vmlinuz-*-cloud-amd64" || compgen -G "/boot/vmlinuz-*-cloud-amd64"; then
        return
    fi >/dev/null
    say "Unpacking Debian's kernel for virtual machines into $place"
    log="$(mktemp)"
    if ! unpack_package "$package" "$place" </dev/null >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "could not unpack a kernel for the guest; as root: apt-get install $package"
    fi
    rm -f "$log"
}

# unpack_package METAPACKAGE DIRECTORY  Fetches what METAPACKAGE depends on, and unpacks it.
unpack_package() {
    local package new="$2.new"
    [ "$(id -u)" -ne 0 ] || [ -n "${APT_UPDATED:-}" ] || apt-get update -q || return
    package="$(apt-cache depends --important "$1" | sed -n 's/^ *Depends: //p' | head -n 1)"
    [ -n "$package" ] || return
    rm -rf "$new" "$2"
    mkdir -p "$new"
    (cd "$new" && apt-get download -q "$package" && dpkg -x ./*.deb . && rm ./*.deb) || return
    mv "$new" "$2" # whole or not at all
}

install_packages() {
    [ $# -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        die "missing packages; as root: apt-get install --no-install-recommends $*"
    fi
    say "Installing Debian packages: $*"
    local log
    log="$(mktemp)"
    if ! { { [ -n "${APT_UPDATED:-}" ] || apt-get update -q; } &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; } \
        </dev/null >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: $*"
    fi
    APT_UPDATED=1
    rm -f "$log"
}

# make_venv [EXTRA]  .venv with replnbd in it (editable) and what EXTRA needs. A stamp makes the
# second run instant: the hash of what .venv was made for, and the extras it has.
make_venv() {
    local extra="${1:-}" python wanted stamp
    python="$(find_python)" || exit 1
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian splits these two off; only its own python3 gets them from the package.
        install_packages python3-venv
        "$python" -c 'import ensurepip, venv' 2>/dev/null || python=/usr/bin/python3
        "$python" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' ||
            die "$python has no ensurepip: install the venv package of your Python"
    fi
    wanted="$("$python" -c 'import hashlib, os, sys
text = open("pyproject.toml", "rb").read() + os.getcwd().encode() + sys.version.encode()
print(hashlib.sha256(text).hexdigest())')"
    stamp="$(cat .venv/stamp 2>/dev/null || true)"
    if [ "${stamp%% *}" != "$wanted" ] || ! .venv/bin/python -c '' 2>/dev/null; then
        say "Setting up .venv with $("$python" -V)"
        rm -rf .venv
        "$python" -m venv .venv
        stamp=""
    elif [ -z "$extra" ] || [[ " $stamp " == *" $extra "* ]]; then
        return
    fi
    .venv/bin/python -m pip install --quiet --no-input -e ".${extra:+[$extra]}" ||
        die "pip could not install replnbd and what it needs (see above)"
    printf '%s\n' "${stamp:-$wanted}${extra:+ $extra}" >.venv/stamp
}
