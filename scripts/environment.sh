# Sourced by scripts/demo, scripts/test and .ci/run: makes the virtual environment, installs Jetplane
# in it and leaves the interpreter's path in $python. A second call with nothing changed installs nothing.
#
#   JETPLANE_PYTHON       the Python to build on (otherwise the first of 3.11 or newer that is found)
#   JETPLANE_VENV         where the environment goes (otherwise .venv beside pyproject.toml)
#   JETPLANE_TORCH        what pip is asked for in place of the pinned torch, taken as it is
#   JETPLANE_TORCH_INDEX  a further package index for torch, for mirrors
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JETPLANE_VENV:-$root/.venv}
torch_version=2.13.0

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    shift
    for line in "$@"; do printf '    %s\n' "$line" >&2; done
    exit 1
}

find_python() {
    local candidate seen=""
    for candidate in ${JETPLANE_PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        # A name may be a version manager's placeholder, so each is run and not only looked up.
        local version
        version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        seen="$seen $candidate=$version"
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    die "Jetplane needs Python 3.11 or newer; found:${seen:- none}." \
        "Install one, or name it: JETPLANE_PYTHON=/path/to/python3.11 ${0}"
}

gpu_visible() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

has_torch() {
    "$python" - <<'PY' 2>/dev/null
import sys, torch
sys.exit(tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11))
PY
}

# The default torch for Linux is a CUDA build of several GB. Where no GPU is visible, the CPU build is
# taken by its version label (+cpu), which never matches the other: first from what pip is configured for,
# then through uv, which knows where PyTorch publishes its CPU builds.
install_torch() {
    if has_torch; then return; fi
    local index=()
    if [ -n "${JETPLANE_TORCH_INDEX:-}" ]; then index=(--extra-index-url "$JETPLANE_TORCH_INDEX"); fi
    if [ -n "${JETPLANE_TORCH:-}" ]; then
        say "installing $JETPLANE_TORCH"
        pip install ${index[@]+"${index[@]}"} "$JETPLANE_TORCH"
    elif [ "$(uname -s)" != Linux ] || gpu_visible; then
        say "installing torch $torch_version"
        pip install ${index[@]+"${index[@]}"} "torch==$torch_version"
    else
        say "installing torch $torch_version, CPU build (no GPU is visible)"
        pip install ${index[@]+"${index[@]}"} "torch==$torch_version+cpu" 2>"$venv/torch-install.log" ||
            { pip install uv && "$venv/bin/uv" pip install --quiet --python "$python" \
                --torch-backend cpu "torch==$torch_version"; } 2>>"$venv/torch-install.log" ||
            {
                say "no CPU build of torch $torch_version could be had (log: $venv/torch-install.log);" \
                    "taking pip's default, which may be a CUDA build: a download of 3 to 5 GB." \
                    "Behind a mirror, stop this and name an index: JETPLANE_TORCH_INDEX=<address> $0"
                pip install "torch==$torch_version"
            } || die "torch $torch_version could not be installed; pip's message is above."
    fi
    has_torch || die "torch was installed in $venv but cannot be imported:" \
        "$("$python" -c 'import torch' 2>&1 | tail -n 1)"
}

pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

set_up() {
    local base stamp
    if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
        base=$(find_python) || exit 1
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$base has no venv module, so no virtual environment can be made." \
                "On Debian and Ubuntu it is a package of its own: apt-get install python3-venv"
        say "making a virtual environment in $venv ($("$base" -V))"
        "$base" -m venv --clear "$venv" || die "the virtual environment $venv could not be made."
    fi
    python=$venv/bin/python
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "the environment $venv has $("$python" -V), and Jetplane needs 3.11 or newer." \
            "Remove it, or choose another place: JETPLANE_VENV=/path ${0}"

    stamp="$root $("$python" -V) $(cat "$root/pyproject.toml" "${BASH_SOURCE[0]}" | cksum)"
    if [ "$(cat "$venv/jetplane-stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
    install_torch
    say "installing Jetplane and what its command line and tests need"
    # torch requires setuptools, so the build needs no environment of its own.
    (cd "$root" && pip install "setuptools>=77.0.3" &&
        pip install --no-build-isolation --editable '.[cli,dev]') ||
        die "the installation failed; pip's message is above."
    echo "$stamp" >"$venv/jetplane-stamp"
}

set -euo pipefail
set_up
