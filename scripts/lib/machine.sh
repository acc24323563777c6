# What haulier's demo and tests need of a machine, beside CRIU and Rust.
# shellcheck shell=bash disable=SC2034 # the lists are for the scripts that load this

pipe_max_bytes=$((4 << 20))

machine_demo_packages=(
    gcc libc6-dev make pkg-config git ca-certificates
    iproute2 iputils-ping nftables procps python3
    redis-server redis-tools
)
machine_test_packages=(curl default-jdk-headless postgresql)

# Pipes of 4 MiB carry pages; beyond this limit they take CAP_SYS_RESOURCE, which containers lack.
machine_pipe_size() {
    local file=/proc/sys/fs/pipe-max-size
    (($(<"$file") < pipe_max_bytes)) || return 0
    say "raising fs.pipe-max-size from $(<"$file") to $pipe_max_bytes (until the next boot)"
    printf '%s\n' "$pipe_max_bytes" >"$file" ||
        die "cannot write $file: set fs.pipe-max-size to $pipe_max_bytes on the host of this container"
}
