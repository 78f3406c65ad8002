#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Inside the virtual machine: two RDMA ports, rxe1 at 10.0.0.1 and rxe2 at 10.0.0.2, on the two ends of one link (left,
# right). All that is sent between them crosses it, so `tc qdisc … dev left` and `ip link set left down` are felt; the
# loopback device would take a short cut, and soft-RoCE works in one network namespace only.
set -eu
ip link add left mtu 4200 type veth peer name right mtu 4200
# Each address is the machine's own, and is still reached over the link: local addresses are looked up last.
echo 1 >/proc/sys/net/ipv4/conf/all/accept_local
add() { # LINK ADDRESS OTHER RXE TABLE
	ip addr add "$2/32" dev "$1"
	ip link set "$1" up
	ip route add "$3" dev "$1" table "$5"
	ip rule add pref 1 iif "$1" lookup local
	ip rule add pref 2 oif "$1" lookup "$5"
	rdma link add "$4" type rxe netdev "$1"
}
add left 10.0.0.1 10.0.0.2 rxe1 101
add right 10.0.0.2 10.0.0.1 rxe2 102
ip rule add pref 3 lookup local
ip rule del pref 0
