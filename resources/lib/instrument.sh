#!/bin/sh
# rustc for fuzz.sh (cargo's RUSTC_WRAPPER): our crates get what a fuzzer needs, coverage and AddressSanitizer, with the
# flags of cargo-fuzz. What they depend on stays as it is: nobody looks for anything there, and the build takes a third.
case $CARGO_PKG_NAME in
    vhost-user-net | vhost-user-net-fuzz)
        exec "$@" --cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
            -Cllvm-args=-sanitizer-coverage-level=4 \
            -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
            -Cllvm-args=-sanitizer-coverage-pc-table \
            -Cllvm-args=-sanitizer-coverage-trace-compares
        ;;
    *) exec "$@" ;;
esac
