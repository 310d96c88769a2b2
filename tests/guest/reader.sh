#!/bin/sh
# Stands in for init: tells what writer.sh left on the disk, and ends the machine.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
trap 'reboot -f' EXIT
mount -o remount,rw /
stty -echo
cd /data
sha256sum -- *
cd /
mount -o remount,ro /
echo TOLD
