#!/bin/sh
# Stands in for init: writes to the disk for ever, in numbered rounds, and tells of each that is synced.
# Everything written in round N is lines of N, so whoever reads the disk knows what is whole and when it was written:
#   N       a new file, never touched again
#   ring    overwritten in place, once N is synced
#   afresh  emptied and written again, once ring is synced; what it held is discarded
# A line that comes in on the console is told, with the round that begins after it.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -o remount,rw,discard /
stty -echo
mkdir -p /data
cd /data || exit
n=0
while :; do
    n=$((n + 1))
    if read -r -t 0; then
        read -r line
        echo "MARK $line $n"
    fi
    text=$((100000000000000 + n))
    yes $text | dd of=$n bs=$((n * 7919 % 32768 + 1)) count=1 iflag=fullblock conv=fsync 2>/dev/null
    yes $text | dd of=ring bs=64k count=1 iflag=fullblock conv=notrunc,fsync 2>/dev/null
    yes $text | dd of=afresh bs=64k count=1 iflag=fullblock conv=fsync 2>/dev/null
    echo "SYNCED $n"
done
