#!/bin/busybox sh
# /init of the guest: brings the network up, then runs what the host says on the second serial port.
# A line is "MARK COMMAND"; all that the command prints comes back, then a line "MARK STATUS".
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
for module in /modules/*; do
    insmod "$module" || echo "guest: cannot load $module"
done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
serve() {
    stty raw -echo
    printf "\nREADY-0 0\n"
    while read -r mark command; do
        sh -ec "$command" </dev/null
        printf '\n%s %s\n' "$mark" "$?"
    done
}
# Not in this process, which inherits what commands leave behind (nbd-client's TLS, for one): when
# such a process ends, busybox's read begins again, and what it had read of a line is lost.
serve </dev/ttyS1 >/dev/ttyS1 2>&1 &
wait $!
