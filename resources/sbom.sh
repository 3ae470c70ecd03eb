#!/usr/bin/env bash
# Prints what the program is built from, as a CycloneDX 1.5 bill of materials. The same sources give
# the same bytes: it bears no date and no serial number.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=resources/lib/common.sh
. "$ROOT/resources/lib/common.sh"

usage() {
    cat <<USAGE
Usage: resources/sbom.sh [TARGET] >vhost-user-net.cdx.json

Prints a bill of materials (CycloneDX 1.5, JSON): the program, and each crate that is built into it
or runs while it is built, with version, licence, checksum and what it depends on in turn. It is
read from Cargo.lock and the manifests; what only tests need is not in it.

  TARGET  the platform it is built for (default: this machine's)
USAGE
}

# The checksums of Cargo.lock, as {"name version": "…"}.
checksums() {
    awk -F'"' '
        /^name = /     { name = $2 }
        /^version = /  { version = $2 }
        /^checksum = / { printf "%s{\"%s %s\":\"%s\"}", separator, name, version, $2; separator = "\n" }
    ' "$ROOT/Cargo.lock" | jq -s add
}

# `cargo metadata` would do, but it counts in what only tests switch on.
bill() {
    run_rust cargo tree --locked --edges normal,build --target "$1" --prefix depth --format '{p}|{l}' |
        jq -Rn --argjson sums "$(checksums)" '
        def purl: "pkg:cargo/\(.name)@\(.version)";
        # Old manifests write a choice of licences with a slash.
        def licence: if . == "" then "NOASSERTION" else gsub("\\s*/\\s*"; " OR ") end;
        def component($type): {
            type: $type, "bom-ref": purl, name, version, purl: purl,
            licenses: [{ expression: (.licence | licence) }]
        } + (($sums["\(.name) \(.version)"]) as $sum |
            if $sum then { hashes: [{ alg: "SHA-256", content: $sum }] } else {} end);

        # Lines such as "2libc v0.2.186|MIT OR Apache-2.0": how deep below the program, name, version, licence. What was
        # printed before ends with "(*)", and what it needs is not printed again.
        [inputs | capture("^(?<depth>[0-9]+)(?<name>\\S+) v(?<version>\\S+)[^|]*\\|(?<licence>.*?)( \\(\\*\\))?$")]
        | .[0] as $program
        | (map(component("library")) | unique_by(.purl) | map(select(.name != $program.name))) as $components
        | reduce .[] as $part ({ above: [], needs: {} };
            ($part.depth | tonumber) as $depth
            | .needs[$part | purl] += []
            | if $depth > 0 then .needs[.above[$depth - 1]] += [$part | purl] else . end
            | .above[$depth] = ($part | purl))
        | {
            bomFormat: "CycloneDX",
            specVersion: "1.5",
            version: 1,
            metadata: { component: ($program | component("application")) },
            components: $components,
            dependencies: [.needs | to_entries[] | { ref: .key, dependsOn: (.value | unique) }] | sort_by(.ref)
        }'
}

main() {
    case ${1:-} in
        --help | -h) usage && exit 0 ;;
        -*) usage >&2 && exit 2 ;;
    esac
    find_rust
    install_missing jq=jq
    bill "${1:-$(run_rust rustc -vV | sed -n 's/^host: //p')}"
}

main "$@" </dev/null
