#!/bin/sh
# Finds what the build and the scripts need, and installs what is missing.
#
# Building RocksDB takes a C++ compiler, and generating its bindings takes libclang; the scripts talk
# to nodes with curl. Nothing is said when nothing is missing. Where apt-get works without a password
# the missing packages are installed; elsewhere the command to run is printed and the exit code is 1.
set -eu

say() { printf 'setup: %s\n' "$*" >&2; }

has() { command -v "$1" >/dev/null 2>&1; }

has_cxx() {
    if [ -n "${CXX:-}" ]; then
        # CXX may carry flags; the compiler is its first word.
        has "${CXX%% *}"
    else
        has c++ || has g++ || has clang++
    fi
}

# Where bindgen looks: LIBCLANG_PATH, what llvm-config says, the loader's list, the usual places.
has_libclang() {
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        [ -f "$LIBCLANG_PATH" ] || any_libclang "$LIBCLANG_PATH"
        return
    fi
    if has llvm-config && any_libclang "$(llvm-config --libdir 2>/dev/null)"; then return 0; fi
    if has ldconfig && ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so'; then return 0; fi
    for dir in /usr/lib/llvm*/lib /usr/lib/llvm*/lib64 /usr/lib /usr/lib64 /usr/lib/*-linux-gnu \
        /usr/local/lib /usr/local/lib64 /opt/homebrew/opt/llvm/lib /usr/local/opt/llvm/lib \
        /Library/Developer/CommandLineTools/usr/lib \
        /Applications/Xcode.app/Contents/Developer/Toolchains/XcodeDefault.xctoolchain/usr/lib; do
        if any_libclang "$dir"; then return 0; fi
    done
    return 1
}

any_libclang() {
    for file in "$1"/libclang.so* "$1"/libclang-[0-9]*.so* "$1"/libclang.dylib; do
        if [ -f "$file" ]; then return 0; fi
    done
    return 1
}

find_missing() {
    MISSING=''
    has_cxx || MISSING="$MISSING a C++ compiler,"
    has_libclang || MISSING="$MISSING libclang,"
    has curl || MISSING="$MISSING curl,"
    MISSING=${MISSING%,}
}

install_with_apt() {
    has apt-get || return 1
    if [ "$(id -u)" -eq 0 ]; then
        as_root=''
    elif has sudo && sudo -n true 2>/dev/null; then
        as_root='sudo'
    else
        return 1
    fi
    packages=''
    has_cxx || packages="$packages g++"
    has_libclang || packages="$packages libclang-dev"
    has curl || packages="$packages curl ca-certificates"
    say "installing$packages"
    # The words are package names and an optional "sudo"; splitting them is meant.
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null >&2 &&
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends $packages </dev/null >&2
}

print_commands() {
    cat >&2 <<'TEXT'
setup: install it with the command for your system, then run this again:
  Debian, Ubuntu   sudo apt-get update && sudo apt-get install -y g++ libclang-dev curl
  Fedora, RHEL     sudo dnf install -y gcc-c++ clang-devel curl
  Arch             sudo pacman -S --needed gcc clang curl
  Alpine           sudo apk add g++ clang-dev curl
  macOS            xcode-select --install
TEXT
}

find_missing
if [ -n "$MISSING" ]; then
    say "missing:$MISSING"
    if ! install_with_apt; then
        print_commands
        exit 1
    fi
    find_missing
    if [ -n "$MISSING" ]; then
        say "still missing after the installation:$MISSING"
        print_commands
        exit 1
    fi
fi

# Installing a Rust toolchain is a choice that a script should not make for anybody.
if ! has cargo; then
    say "cargo is missing: install Rust from https://rustup.rs or your system's packages"
    exit 1
fi
