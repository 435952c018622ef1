#!/usr/bin/env bash
# Install the named programs that PATH lacks: tests/system/tools.sh [PROGRAM...], all by default.
# Needs root and apt-get; the tests that need a program say so when it is still not there.
set -euo pipefail

declare -A package=(
    [redis-server]=redis-server
    [redis-sentinel]=redis-sentinel
    [systemd-analyze]=systemd
    [promtool]=prometheus
    [prometheus]=prometheus
    [chromium]=chromium
)
missing=()
for program in "${@:-${!package[@]}}"; do
    [[ -n ${package[$program]:-} ]] || { echo "expected one of ${!package[*]}, found $program"; exit 2; }
    command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "cannot install ${missing[*]}: expected root and apt-get"
    exit 0
fi

# The packages would start servers on their default ports; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
"${apt[@]}" update </dev/null
"${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
