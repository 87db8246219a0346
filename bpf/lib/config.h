/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Node-wide configuration: frozen .rodata, set by the loader before the programs are verified. The description is a BTF
 * declaration tag, from which `ciliate bpf config` and the reference table in the docs are made.
 */
#pragma once
#include <linux/types.h>
#include <stdbool.h>
#include "addr.h"

#define CONFIG(type, name, description) volatile const type config_##name __attribute__((btf_decl_tag(description)))

CONFIG(__u32, cluster_id, "this cluster's id, 0..255; stands in bits 16..23 of an identity");
CONFIG(bool, ipv4, "pods have IPv4 addresses");
CONFIG(bool, ipv6, "pods have IPv6 addresses");
CONFIG(bool, tunnel, "pods of other nodes are reached by VXLAN; else by the underlay's routes");
CONFIG(bool, masquerade, "pods leave the cluster with the node's address");
CONFIG(__u32, tunnel_ifindex, "the VXLAN device, collect-metadata mode");
CONFIG(__u16, tunnel_port, "UDP port of the overlay, host byte order");
CONFIG(__u32, host_ifindex, "the device by which the host's stack reaches pods");
CONFIG(__u32, native_ifindex, "the device to the underlay");
CONFIG(union addr, node_v4, "this node's IPv4 address (mapped), zero: none; also the masquerade address");
CONFIG(union addr, node_v6, "this node's IPv6 address, zero: none; also the masquerade address");
CONFIG(union addr, gateway_v4, "the pods' link-local IPv4 gateway (mapped), answered by ARP");
CONFIG(union addr, gateway_v6, "the pods' link-local IPv6 gateway, answered by neighbour discovery");
CONFIG(__u16, nat_port_min, "first source port for masquerading, host byte order");
CONFIG(__u16, nat_port_max, "last source port for masquerading, host byte order");
CONFIG(__u64, host_netns, "cookie of the node's own network namespace: whose sockets are the host's");
CONFIG(bool, socket_pods, "sockets of pods are given their backend when they connect; else their packets are");
CONFIG(__u16, node_port_min, "first node port, host byte order");
CONFIG(__u16, node_port_max, "last node port, host byte order; 0: there are none");
CONFIG(__u32, maglev_size, "positions of a Maglev table, a prime");
CONFIG(__u32, underlay_mtu, "MTU of the underlay, octets of IP packet");
CONFIG(__u32, tunnel_mtu, "largest inner IP packet that fits the overlay, octets");

/* A configured address. Read as volatile: through any other pointer the compiler may take the constant for
 * the zero that stands in the object.
 */
static __always_inline union addr config_addr(const volatile union addr *from)
{
	union addr to;

	to.d[0] = from->d[0];
	to.d[1] = from->d[1];
	return to;
}
