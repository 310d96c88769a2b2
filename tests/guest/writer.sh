#!/bin/sh
# shellcheck shell=busybox
# Stands in for init: writes to the disk for ever, in numbered rounds, and tells of each that is synced.
# Everything written in round N is lines of N, so whoever reads the disk knows what is whole and when it was written:
#   N       a new file, never touched again
#   ring    overwritten in place, once N is synced
#   afresh  emptied and written again, once ring is synced; what it held is discarded
# A line that comes in on the console is told, with the round that begins after it.
# The first thing that fails ends the machine.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
trap 'echo FAILED; reboot -f' EXIT
mount -o remount,rw,discard /
stty -echo
mkdir -p /data
cd /data
n=0
while :; do
    n=$((n + 1))
    if read -r -t 0; then
        read -r line
        echo "MARK $line $n"
    fi
    text="$((100000000000000 + n))
"
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do
        text=$text$text
    done
    printf %s "${text:0:$((n * 7919 % 32768 + 1))}" >"$n"
    fsync "$n"
    printf %s "$text" 1<>ring
    fsync ring
    printf %s "$text" >afresh
    fsync afresh
    echo "SYNCED $n"
done
