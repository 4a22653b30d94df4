#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# What udhcpc calls with what it was given.

case $1 in
bound | renew)
	ip -4 addr flush dev "$interface" 2>/dev/null # IPv6 addresses are the routers' affair
	ip addr add "$ip/${mask:-32}" dev "$interface"
	test -n "$mtu" && ip link set "$interface" mtu "$mtu"
	for gateway in $router; do
		ip route replace "$gateway" dev "$interface"
		ip route replace default via "$gateway" dev "$interface"
		break
	done
	echo "${search:+search $search}" >/etc/resolv.conf
	for server in $dns; do
		echo "nameserver $server" >>/etc/resolv.conf
	done
	;;
esac
