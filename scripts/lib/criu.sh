# A CRIU that works on the running kernel: found, or built from Debian's source package. And its crit,
# with which the tests read images.
# shellcheck shell=bash

criu_prefix=/opt/haulier/criu
criu_minimum=4.1 # the first with everything haulier asks of it over RPC
criu_suites=(sid trixie)
criu_build_packages=(
    gcc libc6-dev make pkg-config python3 xz-utils
    libaio-dev libcap-dev libnet1-dev libnftables-dev libnl-3-dev
    libprotobuf-c-dev libprotobuf-dev protobuf-c-compiler protobuf-compiler uuid-dev
)
criu_run_packages=(iproute2 nftables)
crit_build_packages=(libprotobuf-dev protobuf-compiler python3 xz-utils)
crit_run_packages=(python3 python3-protobuf)

# Prints a binary's version, such as 4.2.1; nothing if it does not run.
criu_version() {
    "$1" --version 2>/dev/null | sed -n 's/^Version: *//p' || true
}

# Succeeds if the binary is new enough and says that this kernel has what it needs.
# Otherwise the reason is in criu_reason.
criu_usable() {
    local binary=$1 version log
    criu_reason=
    [[ -x $binary ]] || { criu_reason="not there"; return 1; }
    version=$(criu_version "$binary")
    [[ -n $version ]] || { criu_reason="does not run"; return 1; }
    version_at_least "$version" "$criu_minimum" ||
        { criu_reason="is version $version, $criu_minimum is needed"; return 1; }
    log=$("$binary" check 2>&1) ||
        { criu_reason="version $version: 'criu check' says: $(tail -n 3 <<<"$log" | tr '\n' ' ')"; return 1; }
}

# Prints the first usable CRIU: $HAULIER_CRIU (then nothing else counts), PATH, our own prefix.
criu_find() {
    local candidate
    if [[ -n ${HAULIER_CRIU:-} ]]; then
        criu_usable "$HAULIER_CRIU" || die "HAULIER_CRIU=$HAULIER_CRIU: $criu_reason"
        printf '%s\n' "$HAULIER_CRIU"
        return
    fi
    for candidate in "$(type -P criu || true)" "$criu_prefix/sbin/criu"; do
        [[ -n $candidate && -e $candidate ]] || continue
        if criu_usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        say "$candidate $criu_reason"
    done
    return 1
}

# The mirror this machine already uses for Debian proper (not the security archive).
criu_mirror() {
    local uri
    # shellcheck disable=SC2016 # apt's placeholder, not the shell's
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        grep -E '/debian/?$' | head -n 1 || true)
    printf '%s\n' "${uri:-http://deb.debian.org/debian}"
}

criu_keyring() {
    local keyring
    for keyring in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        [[ ! -e $keyring ]] || { printf '%s\n' "$keyring"; return; }
    done
    die "no Debian archive keyring in /usr/share/keyrings: install debian-archive-keyring"
}

# apt-get with lists, sources and cache of its own in $1: /etc/apt's sources stay as they are.
# The signature of the suite and, through it, the tarball's checksum are apt's to verify. How old
# the suite's list is does not matter, as long as CRIU is new enough: a mirror may be a snapshot.
criu_apt() {
    local dir=$1
    shift
    apt-get -qq -o Dir::Etc::SourceList="$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State::Lists="$dir/lists" -o Dir::Cache="$dir/cache" \
        -o Acquire::Check-Valid-Until=false -o APT::Get::List-Cleanup=false -o APT::Sandbox::User=root "$@"
}

# Downloads the upstream tarball of a suite's source package into $2.
criu_download() {
    local suite=$1 dir=$2 keyring
    keyring=$(criu_keyring)
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    printf 'deb-src [signed-by=%s] %s %s main\n' "$keyring" "$(criu_mirror)" "$suite" >"$dir/sources.list"
    criu_apt "$dir" update >&2 &&
        (cd "$dir" && criu_apt "$dir" source --download-only --tar-only criu >&2)
}

criu_unpack() {
    mkdir "$1/source"
    tar -xJf "$1"/criu_*.orig.tar.xz -C "$1/source" --strip-components=1
}

# Builds the tarball in $1 and leaves the binary as $1/prefix/sbin/criu, and crit beside it.
criu_compile() {
    local dir=$1
    criu_unpack "$dir" || return 1
    crit_compile "$dir" || say "crit does not build" # CRIU does without
    make -C "$dir/source" -j"$(nproc)" criu >"$dir/make.log" 2>&1 ||
        { tail -n 30 "$dir/make.log" >&2; return 1; }
    install -D -m 0755 "$dir/source/criu/criu" "$dir/prefix/sbin/criu"
}

# Makes crit of the sources in $1, as $1/prefix/bin/crit. It is Python, with Debian's python3-protobuf.
crit_compile() {
    local source=$1/source prefix=$1/prefix modules=$1/prefix/lib/python images module protos
    mkdir -p "$prefix/bin" "$modules" || return 1
    cp -R "$source/lib/pycriu" "$source/crit/crit" "$modules" || return 1
    images=$modules/pycriu/images
    mapfile -t protos < <(find "$source/images" -name '*.proto' ! -name rpc.proto)
    protoc -I"$source/images" -I/usr/include --python_out="$images" "${protos[@]}" &&
        protoc -I"$source/images" --python_out="$modules/pycriu" "$source/images/rpc.proto" &&
        python3 "$source/scripts/magic-gen.py" "$source/criu/include/magic.h" "$images/magic.py" || return 1
    for module in "$images"/*_pb2.py; do
        module=$(basename "$module" .py)
        [[ $module == opts_pb2 ]] || printf 'from .%s import *\n' "$module"
    done >"$images/pb.py"
    printf "__version__ = 'of haulier'\n" | tee "$modules/pycriu/version.py" >"$modules/crit/version.py"
    printf '#!/bin/sh\nPYTHONPATH=%s exec /usr/bin/python3 -m crit "$@"\n' \
        "$criu_prefix/lib/python" >"$prefix/bin/crit"
    chmod 0755 "$prefix/bin/crit"
}

# Tries one suite in a directory of its own; $dir/prefix is usable if it succeeds.
criu_try_suite() {
    local suite=$1 dir=$2
    mkdir "$dir"
    say "fetching CRIU's source from Debian $suite"
    criu_download "$suite" "$dir" || { say "no CRIU source from Debian $suite"; return 1; }
    say "building $(basename "$dir"/criu_*.orig.tar.xz .orig.tar.xz) (about 20 s)"
    criu_compile "$dir" || { say "CRIU from Debian $suite does not build"; return 1; }
    criu_usable "$dir/prefix/sbin/criu" || { say "CRIU from Debian $suite: $criu_reason"; return 1; }
}

# Puts a finished prefix in place; a reader sees the old tree, none for an instant, or the new one.
criu_put_in_place() {
    rm -rf "$criu_prefix.old"
    [[ ! -e $criu_prefix ]] || mv "$criu_prefix" "$criu_prefix.old"
    mv "$1" "$criu_prefix"
    rm -rf "$criu_prefix.old"
}

# Builds a CRIU into the private prefix; call with the lock held. A subshell, for its own trap.
criu_build() (
    need_root "CRIU is to be built into $criu_prefix"
    apt_install "${criu_build_packages[@]}" "${criu_run_packages[@]}"
    # Beside the prefix: the last step is a rename, which does not cross file systems.
    work=$(mktemp -d "${criu_prefix%/*}/criu-build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    for suite in "${criu_suites[@]}"; do
        if criu_try_suite "$suite" "$work/$suite"; then
            criu_put_in_place "$work/$suite/prefix"
            exit 0
        fi
    done
    die "no CRIU that works on kernel $(uname -r) could be built"
)

# Prints a usable CRIU, and builds it first if there is none. Not for use in a condition: there
# bash would not stop at the first error.
criu_ensure() {
    local lock
    if criu_find; then return; fi
    mkdir -p "${criu_prefix%/*}"
    exec {lock}>"${criu_prefix%/*}/criu.lock"
    flock -w 900 "$lock" || die "another build of CRIU has held ${criu_prefix%/*}/criu.lock for 15 minutes"
    # Whoever held the lock may have built it.
    if criu_find 2>/dev/null; then return; fi
    criu_build
    criu_find
}

# Succeeds if our own prefix has a crit that runs.
crit_usable() {
    "$criu_prefix/bin/crit" --version >/dev/null 2>&1
}

# Makes the crit of a CRIU that was not built here, or was before crit was; with the lock held.
crit_build() (
    need_root "crit is to be built into $criu_prefix"
    apt_install "${crit_build_packages[@]}" "${crit_run_packages[@]}"
    if crit_usable; then exit 0; fi
    work=$(mktemp -d "${criu_prefix%/*}/criu-build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    for suite in "${criu_suites[@]}"; do
        mkdir "$work/$suite"
        say "fetching crit's source from Debian $suite"
        criu_download "$suite" "$work/$suite" && criu_unpack "$work/$suite" &&
            crit_compile "$work/$suite" || continue
        mkdir -p "$criu_prefix/bin" "$criu_prefix/lib"
        rm -rf "$criu_prefix/lib/python"
        mv "$work/$suite/prefix/lib/python" "$criu_prefix/lib/"
        mv "$work/$suite/prefix/bin/crit" "$criu_prefix/bin/"
        exit 0
    done
    die "no crit could be built"
)

# Makes sure that our own prefix has a crit.
crit_ensure() {
    local lock
    if crit_usable; then return; fi
    mkdir -p "${criu_prefix%/*}"
    exec {lock}>"${criu_prefix%/*}/criu.lock"
    flock -w 900 "$lock" || die "another build of CRIU has held ${criu_prefix%/*}/criu.lock for 15 minutes"
    crit_build
    exec {lock}>&-
    crit_usable || die "crit was built, and does not run"
}
