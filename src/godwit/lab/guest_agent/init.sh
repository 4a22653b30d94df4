#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The first process of the laboratory's guest. The kernel command line says
# how the network is to be set up:
#
#   godwit.ip=dhcp | godwit.ip=ADDR/LEN,GATEWAY      IPv4; none given: no IPv4
#   godwit.ip6=auto | godwit.ip6=ADDR/LEN,GATEWAY    IPv6; none given: no IPv6
#
# /run/net holds one line for each of the two that is done.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /run /tmp
echo 1048576 >/proc/sys/fs/nr_open
echo 1048576 >/proc/sys/fs/file-max
# Thousands of connections to one address come from one.
echo "1024 64999" >/proc/sys/net/ipv4/ip_local_port_range
echo 8192 >/proc/sys/net/core/somaxconn
echo 8192 >/proc/sys/net/ipv4/tcp_max_syn_backlog
# What an interface starts with, so before there is one: its addresses are usable
# at once, without asking first whether somebody else has them, and a router is
# asked for without delay.
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/router_solicitation_delay
for module in $(cat /modules/order); do
	insmod "/modules/$module"
done
: >/run/net
ip link set lo up

ip4= ip6=
for word in $(cat /proc/cmdline); do
	case $word in
	godwit.ip=*) ip4=${word#*=} ;;
	godwit.ip6=*) ip6=${word#*=} ;;
	esac
done

setup4() {
	case $ip4 in
	dhcp) udhcpc -i eth0 -f -q -n -t 20 -T 1 -O search -s /etc/udhcpc.sh >/run/udhcpc.log 2>&1 && echo ip4 >>/run/net ;;
	?*)
		ip addr add "${ip4%,*}" dev eth0
		ip route add default via "${ip4#*,}" dev eth0
		echo ip4 >>/run/net
		;;
	esac
}

setup6() {
	case $ip6 in
	auto)
		# The kernel asks for an advertisement when the link comes up, and again a few seconds later.
		for _ in $(seq 200); do
			if ip -6 route show default | grep -q . && ip -6 addr show dev eth0 scope global | grep -q inet6; then
				echo ip6 >>/run/net
				break
			fi
			usleep 100000
		done
		;;
	?*)
		ip -6 addr add "${ip6%,*}" dev eth0
		ip -6 route add default via "${ip6#*,}" dev eth0
		echo ip6 >>/run/net
		;;
	esac
}

if [ "$ip6" != auto ]; then
	echo 0 >/proc/sys/net/ipv6/conf/default/accept_ra
	test -d /sys/class/net/eth0 && echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_ra
fi
if [ -d /sys/class/net/eth0 ]; then
	ip link set eth0 up
	setup4 &
	setup6 &
fi
# Pressing the power button runs /etc/acpi/PWRF/00000080.
test -e /dev/input/event0 && acpid -l /dev/null
exec /bin/agent /dev/ttyS1
