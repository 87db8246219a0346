/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Why a packet was dropped. Where Cilium has the same reason the number is Cilium's (DropReason in its flow.proto), so
 * that Hubble clients print it; numbers from 220 on are ours. Functions return the negated number.
 */
#pragma once

enum drop_reason {
	DROP_NONE = 0,
	DROP_INVALID_SIP = 132,    /* the source is none of the endpoint's addresses, or lies about its node */
	DROP_POLICY_DENIED = 133,  /* no rule allows it */
	DROP_INVALID_PACKET = 134, /* malformed or truncated */
	DROP_UNSUPPORTED_L3 = 139, /* neither IPv4, IPv6 nor ARP */
	DROP_WRITE_ERROR = 141,    /* a helper could not change the packet */
	DROP_UNKNOWN_L4 = 142,     /* a protocol that cannot be tracked */
	DROP_TUNNEL_KEY = 147,     /* tunnel metadata could not be read or set */
	DROP_CT_CREATE_FAILED = 155,
	DROP_EXT_HEADERS = 156, /* more IPv6 extension headers than are walked, or a bad one */
	DROP_NO_SERVICE = 158,  /* a frontend without a backend here, or a port that its address does not have */
	DROP_NO_TUNNEL_ENDPOINT = 160,
	DROP_NO_POLICY = 165,        /* the endpoint's policy has no row yet: fail closed */
	DROP_NAT_NO_MAPPING = 167,   /* no port to this destination is free, or no connection behind the port */
	DROP_NO_ROUTE = 169,         /* FIB look-up failed */
	DROP_TUNNEL_PORT = 170,      /* a pod sent to a node's tunnel port */
	DROP_INVALID_VNI = 171,      /* the identity in the tunnel header may not come from there */
	DROP_UNKNOWN_NODE = 172,     /* tunnelled packet from an address that is no node's */
	DROP_FRAG_NOT_FOUND = 175,   /* a later fragment whose first one was not seen */
	DROP_NOT_IN_SRC_RANGE = 177, /* the client is in none of the service's loadBalancerSourceRanges */
	DROP_POLICY_DENY = 181,      /* a deny rule matched */
	DROP_PROXY_NOT_FOUND = 220,  /* policy sends it to the proxy, which does not listen: fail closed */
	DROP_TOO_BIG = 221,          /* over the MTU; the sender was told where that is possible */
	DROP_NO_ENDPOINT = 222,      /* interface without an endpoint row */
	DROP_UNSUPPORTED_DEST = 223, /* multicast or broadcast from a pod */
	DROP_ICMP_UNRELATED = 224,   /* an ICMP error that belongs to no connection */
	DROP_INTERNAL = 225,         /* scratch space or configuration missing: a bug */
};
