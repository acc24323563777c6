# A Rust toolchain new enough for the workspace, and the two cargo tools the tests use.
# shellcheck shell=bash

rust_tools=/opt/haulier/cargo # where our own cargo-nextest and cargo-deny go

# The workspace's `rust-version`.
rust_minimum() {
    sed -n 's/^rust-version = "\(.*\)"$/\1/p' "${haulier_root:?}/Cargo.toml"
}

# Prints the version of the rustc in a directory; nothing if it, or the cargo beside it, does not run.
rust_version_in() {
    "$1/cargo" --version >/dev/null 2>&1 || return 0
    "$1/rustc" --version 2>/dev/null | sed -n 's/^rustc \([0-9.]*\).*/\1/p' || true
}

# Prints the first directory with a toolchain that is new enough: PATH, the distribution's, rustup's.
rust_find() {
    local minimum directory version
    minimum=$(rust_minimum)
    while read -r directory; do
        version=$(rust_version_in "$directory")
        if [[ -n $version ]] && version_at_least "$version" "$minimum"; then
            printf '%s\n' "$directory"
            return
        fi
    done < <(rust_directories)
    return 1
}

rust_directories() {
    type -aP cargo | sed 's,/cargo$,,'
    # rustup's stable last, and by its own path: the user's default may be older, and stays.
    printf '%s\n' /usr/bin "${CARGO_HOME:-$HOME/.cargo}/bin" "${RUSTUP_HOME:-$HOME/.rustup}"/toolchains/stable-*/bin
}

# Puts the toolchain and our tools on PATH.
rust_use() {
    local directory
    directory=$(rust_find) || die "no Rust $(rust_minimum) or newer; scripts/setup installs one"
    PATH=$directory:$PATH:$rust_tools/bin
    export PATH
    rust_version=$(rust_version_in "$directory")
}

# Installs a toolchain if there is none that is new enough; rustfmt and clippy too with "lint".
rust_ensure() {
    local lint=${1:-}
    rust_find >/dev/null || rust_install_packaged || rust_install_rustup
    rust_use
    [[ -z $lint ]] || rust_ensure_lint
}

# The suffix of the distribution's newest rustc and cargo packages that will do: Debian 13 has
# them as rustc and cargo, Debian 12 as rustc-web and cargo-web (kept up for its browsers).
rust_packaged_suffix() {
    local suffix compiler
    for suffix in "" -web; do
        compiler=$(apt_candidate "rustc$suffix")
        if [[ -n $compiler && -n $(apt_candidate "cargo$suffix") ]] &&
            version_at_least "${compiler%%[+~-]*}" "$(rust_minimum)"; then
            printf '%s\n' "$suffix"
            return
        fi
    done
    return 1
}

rust_install_packaged() {
    local suffix
    apt_update
    suffix=$(rust_packaged_suffix) || return 1
    apt_install "rustc$suffix" "cargo$suffix"
    rust_find >/dev/null
}

rust_install_rustup() {
    say "this distribution has no Rust $(rust_minimum): installing the stable toolchain with rustup"
    apt_install curl ca-certificates
    if ! type -P rustup >/dev/null; then
        say "fetching https://sh.rustup.rs"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
            sh -s -- -y --no-modify-path --profile minimal >&2 || die "rustup's installer failed"
    fi
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    rustup toolchain install stable --profile minimal -c rustfmt -c clippy >&2 || die "rustup failed"
}

rust_ensure_lint() {
    local compiler=rustc-web formatter=rustfmt-web linter=rust-web-clippy
    if { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then return; fi
    if [[ $(type -P cargo) != /usr/bin/cargo ]]; then
        rustup component add rustfmt clippy >&2 || die "this toolchain has no rustfmt or clippy"
        return
    fi
    # The two must be of the compiler's version, so from the compiler's source package.
    [[ -z $(apt_missing "$compiler") ]] || { formatter=rustfmt; linter=rust-clippy; }
    apt_install "$formatter" "$linter"
}

# Installs a cargo tool from crates.io if it is missing. $2 is for compilers from $3 on, $4 for older ones.
rust_ensure_tool() {
    local tool=$1 version=$2 since=$3
    version_at_least "$rust_version" "$since" || version=$4
    if type -P "$tool" >/dev/null; then return; fi
    need_root "$tool is to be built into $rust_tools"
    say "building $tool $version from crates.io (minutes)"
    # Built for a few runs of a second each: optimising them would take longer than it saves.
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_DEBUG=0 \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        env -u CARGO_TARGET_DIR cargo install --quiet --locked --root "$rust_tools" --version "$version" "$tool" >&2 ||
        die "$tool $version does not build"
}

# CI must have both. Elsewhere scripts/test does without, and says so: nextest takes minutes to build.
rust_ensure_tools() {
    [[ ${CI:-} == true ]] || return 0
    rust_ensure_tool cargo-nextest 0.9.143 1.91 0.9.100
    rust_ensure_tool cargo-deny 0.20.2 1.88 0.18.3
}
