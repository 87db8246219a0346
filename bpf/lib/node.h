/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The host firewall: node policies on what the node itself sends and receives by the underlay device. What it exchanges
 * with pods is judged where pods' traffic is. See docs/adr/0009-the-host-is-an-endpoint.md.
 */
#pragma once
#include "deliver.h"

#define AF_INET 2
#define AF_INET6 10

/* Link-scope control without which the node loses its neighbours: discovery, and the listener reports that let a switch
 * pass it (RFC 4861, RFC 2710, RFC 3810). The stack checks that it comes from the link.
 */
static __always_inline bool is_link_control(const struct pkt *p)
{
	if (p->family != 6 || p->protocol != PROTO_ICMPV6)
		return false;
	return is_nd(p) || (p->icmp_type >= 130 && p->icmp_type <= 132) || p->icmp_type == 143;
}

/* Whether the frame is another device's, on top of this one. VLAN 0 is a priority only (IEEE 802.1Q): this device's own. */
static __always_inline bool is_of_vlan(const struct __sk_buff *skb)
{
	return skb->vlan_present && skb->vlan_tci & 0xfff;
}

/* Whether the node is meant: its addresses, those of other devices too, multicast and broadcast. */
static __noinline int is_for_node(struct __sk_buff *skb, struct scratch *s)
{
	struct bpf_fib_lookup fib = {};
	struct local_addr *local;
	long result;

	if (!s)
		return 1;
	local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);
	if (local)
		return !!(local->flags & LOCAL_HOST);
	if (is_multicast(&s->p))
		return 1;
	fib.ifindex = skb->ifindex;
	if (s->p.family == 4) {
		fib.family = AF_INET;
		fib.ipv4_src = s->p.saddr.w[3];
		fib.ipv4_dst = s->p.daddr.w[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &s->p.saddr, 16);
		__builtin_memcpy(fib.ipv6_dst, &s->p.daddr, 16);
	}
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	/* A device that does not forward hands everything to the node. */
	return result < 0 || result == BPF_FIB_LKUP_RET_NOT_FWDED || result == BPF_FIB_LKUP_RET_FWD_DISABLED;
}

/* Fills an end outside this node, as the ipcache knows it. */
static __always_inline struct ipcache_entry *end_outside(struct scratch *s, struct end *end, const union addr *addr)
{
	struct ipcache_entry *entry = ipcache_find(addr);

	if (entry)
		end_remote(end, entry->identity, entry->flags & (IPCACHE_POD | IPCACHE_NODE));
	else
		end_remote(end, world_identity(&s->p), false);
	return entry;
}

static __always_inline bool is_node(const union addr *addr)
{
	struct ipcache_entry *entry = ipcache_find(addr);

	return entry && entry->flags & IPCACHE_NODE;
}

/* The overlay itself, between nodes, and errors about it: what is inside is judged at its own hooks. */
static __always_inline bool is_overlay(const struct pkt *p, const union addr *peer)
{
	if (!config_tunnel)
		return false;
	if (p->quoted)
		return p->q_protocol == IPPROTO_UDP && p->q_dport == bpf_htons(config_tunnel_port) &&
		       is_node(&p->q_daddr);
	return p->protocol == IPPROTO_UDP && p->dport == bpf_htons(config_tunnel_port) && is_node(peer);
}

/* State of the node's TCP socket for a local and a far end (enum bpf_tcp state, include/net/tcp_states.h); 0: none. */
static __always_inline __u32 socket_state(struct __sk_buff *skb, const struct pkt *p, bool outgoing, bool any_peer)
{
	const union addr *local = outgoing ? &p->saddr : &p->daddr, *peer = outgoing ? &p->daddr : &p->saddr;
	__be16 local_port = outgoing ? p->sport : p->dport;
	__be16 peer_port = any_peer ? 0 : outgoing ? p->dport : p->sport;
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size, state;

	if (p->family == 4) {
		tuple.ipv4.saddr = peer->w[3];
		tuple.ipv4.daddr = local->w[3];
		tuple.ipv4.sport = peer_port;
		tuple.ipv4.dport = local_port;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, peer, 16);
		__builtin_memcpy(tuple.ipv6.daddr, local, 16);
		tuple.ipv6.sport = peer_port;
		tuple.ipv6.dport = local_port;
		size = sizeof(tuple.ipv6);
	}
	sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
}

/* Who began a TCP connection that is older than the first node policy, or whose row was evicted: the peer where the node
 * listens on the local port, else the node, if it has a socket for it at all. Without this, an answer to the node would
 * count as a connection to it.
 */
static __noinline int node_began(struct __sk_buff *skb, struct scratch *s)
{
	bool outgoing;

	if (!s)
		return 0;
	outgoing = s->observation == OBS_TO_NETDEV;
	if (socket_state(skb, &s->p, outgoing, true) == TCP_STATE_LISTEN)
		return 0;
	return outgoing || socket_state(skb, &s->p, outgoing, false);
}

/* Judges a packet of the node's own, both ends filled: lets it go on where it was going, or drops it. `policy`: the id in
 * force in the packet's direction.
 */
static __always_inline int judge_node(struct __sk_buff *skb, struct scratch *s, __u32 policy)
{
	int result = track(s, TRACK_NODE);

	if (result == TRACK_ASK) {
		bool outgoing = s->observation == OBS_TO_NETDEV;

		result = track(s, !!node_began(skb, s) == outgoing ? TRACK_POLICY : TRACK_REVERSED);
	}
	if (result == -DROP_ICMP_UNRELATED && !policy)
		return TC_ACT_UNSPEC; /* about what the node forwards for others, say: no policy speaks of it */
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD)
		return drop(s, -DROP_PROXY_NOT_FOUND);
	count(0, s->observation == OBS_TO_NETDEV ? DIR_EGRESS : DIR_INGRESS, s->p.length);
	return TC_ACT_UNSPEC;
}
