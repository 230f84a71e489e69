# Sourced by the commands beside it (bash): `ensure_environment serve` or `ensure_environment dev`
# leaves a complete .venv with what requirements.txt or requirements-dev.txt lists;
# `ensure_environment demo` a .venv-demo with requirements-demo.txt, which fits neither.
#
# A stamp in .venv, written last, holds the Python version and the requirements that are installed.
# While it matches, nothing is run; otherwise pip finishes what is there. CLIPGEN_TORCH_INDEX may
# name an index with a CPU-only torch.

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

ensure_environment() {
    local venv="$project/.venv" # of all functions below
    [ "$1" != demo ] || venv="$project/.venv-demo"
    if is_complete "$1"; then return; fi
    trap 'exit 130' INT
    exec 9<"$project/requirements.txt"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "clipgen: waiting for another process that installs into $venv" >&2
        flock 9
    fi
    is_complete "$1" || install "$1"
    exec 9<&-
    trap - INT
}

is_complete() {
    [ -e "$venv/clipgen-$1" ] && [ "$(wanted_stamp "$1")" = "$(cat "$venv/clipgen-$1")" ]
}

wanted_stamp() {
    python_version "$venv/bin/python"
    case "$1" in
    serve) cat "$project/requirements.txt" ;;
    dev) cat "$project/requirements.txt" "$project/requirements-dev.txt" ;;
    demo) cat "$project/requirements-demo.txt" ;;
    esac
}

install() {
    local requirements=requirements.txt python size=6 peak=12 package
    [ "$1" = serve ] || requirements="requirements-$1.txt"
    if [ "$1" = demo ]; then
        size=1 peak=2
    elif [ -n "${CLIPGEN_TORCH_INDEX:-}" ] || [ "$(uname -sm)" != "Linux x86_64" ]; then
        size=1 peak=3 # no CUDA libraries
    fi

    rm -rf "$venv"/clipgen-* "$venv/tmp"
    if has_pip; then
        echo "clipgen: completing $venv with $requirements" >&2
    else
        python="$(find_python)" || exit 1
        check_space "$peak"
        echo "clipgen: installing $requirements into $venv (about $size GB, once)" >&2
        run "$python" -m venv --clear "$venv"
    fi

    # pip writes INSTALLER after a package's files: one without it was cut short, yet would count.
    for package in "$venv"/lib/python3.*/site-packages/*.dist-info; do
        [ -e "$package/INSTALLER" ] || rm -rf "$package"
    done
    mkdir -p "$venv/tmp" # for downloads: /tmp may be small
    if [ -n "${CLIPGEN_TORCH_INDEX:-}" ] && [ "$1" != demo ]; then
        pip_install --no-deps --index-url "$CLIPGEN_TORCH_INDEX" \
            $(grep -E '^torch(vision)?==' "$project/requirements.txt")
    fi
    pip_install -r "$project/$requirements"
    rm -rf "$venv/tmp"

    [ "$1" != dev ] || wanted_stamp serve >"$venv/clipgen-serve"
    wanted_stamp "$1" >"$venv/clipgen-$1"
}

# venv writes bin/activate after everything else, pip included.
has_pip() {
    [ -e "$venv/bin/activate" ] && is_supported "$(python_version "$venv/bin/python")" &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

pip_install() {
    TMPDIR="$venv/tmp" run "$venv/bin/python" -m pip install \
        --quiet --no-input --disable-pip-version-check "$@"
}

find_python() {
    local name version others="" incomplete=""
    for name in python3.11 python3.12 python3 python; do
        version="$(python_version "$name")" || continue
        if ! is_supported "$version"; then
            others="${others:+$others, }$name is $version"
        elif "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$name"
            return
        else
            incomplete="${incomplete:-$version}"
        fi
    done
    if [ -n "$incomplete" ]; then
        stop "Python $incomplete lacks its venv module: install it" \
            "(Debian and Ubuntu: apt install python$incomplete-venv)"
    fi
    stop "Python 3.11 or 3.12 is needed: install one of them and run the command again" \
        "(found: ${others:-none})"
}

# Asks the command itself: with pyenv there are commands for Pythons that are not installed.
python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_supported() {
    [ "$1" = 3.11 ] || [ "$1" = 3.12 ]
}

check_space() {
    local free
    free="$(df -Pk "$project" | awk 'NR == 2 { print int($4 / 1000000) }')"
    [ "${free:-$1}" -ge "$1" ] ||
        stop "the install needs $1 GB of free disk space in $project, where $free GB are left"
}

# Runs a command silently; if it fails, stops with its cause in one sentence.
run() {
    local output
    output="$("$@" 2>&1)" && return
    rm -rf "$venv/tmp"
    case "$output" in
    *"No space left"* | *"Errno 28"* | *"quota exceeded"*)
        stop "the disk is full: the install needs up to $peak GB; free some and run the command again"
        ;;
    *onnection* | *"timed out"* | *"name resolution"* | *SSLError* | *ProxyError* | *"HTTP error"*)
        stop "the Python packages could not be downloaded: check the network and run the command" \
            "again, it goes on from there"
        ;;
    *)
        stop "the install failed (${output##*$'\n'}): put that right and run the command again"
        ;;
    esac
}

stop() {
    echo "clipgen: $*" >&2
    exit 1
}
