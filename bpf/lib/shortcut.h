/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The middle of a TCP or UDP connection between two pods of this node, in two look-ups.
 *
 * It may only repeat what the long way has found out for the same direction of the same connection at the same epoch:
 * everything the long way asks (who owns the source, both policies) is answered anew after the epoch has moved. Where the
 * destination is now is looked up here as well. Whatever is not plain, and what begins or ends a connection, goes the
 * long way; so does an error, which is reported there.
 */
#pragma once
#include "deliver.h"

#define SHORTCUT_NONE (-1)
/* No pod's path takes less (path_mtu()), so nothing up to here can be too big. */
#define SHORTCUT_MAX 65000

/* What of a packet the shortcut needs. */
struct glance {
	struct ct_key key;
	bool from_b; /* the source is end b of the key */
	__u8 tcp_flags;
	__u32 length;
};

/* Ports and flags; `room`: octets of the packet from here on. False: not a plain packet within a connection. */
static __always_inline bool glance_l4(struct glance *g, const void *l4, const void *end, __u8 protocol, __u32 room,
				      __be16 *ports)
{
	g->tcp_flags = 0;
	if (protocol == IPPROTO_TCP) {
		const struct tcphdr *tcp = l4;

		if ((const void *)(tcp + 1) > end || tcp->doff < 5 || tcp->doff * 4U > room)
			return false;
		g->tcp_flags = ((const __u8 *)l4)[13];
		if (g->tcp_flags & TCP_SYN)
			return false;
	} else if (protocol != IPPROTO_UDP || (const void *)((const struct udphdr *)l4 + 1) > end ||
		   room < sizeof(struct udphdr)) {
		return false;
	}
	ports[0] = ((const __be16 *)l4)[0];
	ports[1] = ((const __be16 *)l4)[1];
	return true;
}

static __always_inline bool glance_v4(const struct __sk_buff *skb, struct glance *g)
{
	const struct iphdr *ip = (void *)(long)skb->data + ETH_HLEN_;
	const void *end = (void *)(long)skb->data_end;
	union addr source, dest;
	__be16 ports[2];

	if ((const void *)(ip + 1) > end || *(const __u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff))
		return false;
	g->length = bpf_ntohs(ip->tot_len);
	if (g->length < sizeof(*ip) || !glance_l4(g, ip + 1, end, ip->protocol, g->length - sizeof(*ip), ports))
		return false;
	addr_set_v4(&source, ip->saddr);
	addr_set_v4(&dest, ip->daddr);
	g->from_b = ct_key_set(&g->key, &source, ports[0], &dest, ports[1], ip->protocol, LEG_DIRECT);
	return true;
}

static __always_inline bool glance_v6(const struct __sk_buff *skb, struct glance *g)
{
	const struct ipv6hdr *ip = (void *)(long)skb->data + ETH_HLEN_;
	const void *end = (void *)(long)skb->data_end;
	union addr source, dest;
	__be16 ports[2];

	if ((const void *)(ip + 1) > end || ip->version != 6 || !ip->payload_len)
		return false;
	g->length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
	if (!glance_l4(g, ip + 1, end, ip->nexthdr, g->length - sizeof(*ip), ports))
		return false;
	__builtin_memcpy(&source, &ip->saddr, sizeof(source));
	__builtin_memcpy(&dest, &ip->daddr, sizeof(dest));
	if (addr_is_v4(&source) || addr_is_v4(&dest)) /* would find the row of an IPv4 connection */
		return false;
	g->from_b = ct_key_set(&g->key, &source, ports[0], &dest, ports[1], ip->nexthdr, LEG_DIRECT);
	return true;
}

static __always_inline bool glance(const struct __sk_buff *skb, struct glance *g)
{
	bool plain = false;

	if (skb->vlan_present)
		return false;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		plain = glance_v4(skb, g);
	else if (config_ipv6 && skb->protocol == bpf_htons(ETH_P_IPV6))
		plain = glance_v6(skb, g);
	return plain && g->length <= SHORTCUT_MAX && g->length <= skb->len - ETH_HLEN_;
}

/* Whether the row, whose flags were read before, answers for this direction now. */
static __always_inline bool row_answers(const struct ct_entry *e, __u32 flags, __u64 at, __u64 now, __u32 ifindex,
					bool reply)
{
	return e->epoch == at && e->sender[reply ? 1 : 0] == ct_sender(at, ifindex) && e->expires > now &&
	       (flags & (CT_SEEN_REPLY | CT_DENIED | CT_PROXIED)) == CT_SEEN_REPLY;
}

/* From a pod: returns what the hook shall return, or SHORTCUT_NONE. Changes nothing in the latter case. */
static __always_inline int shortcut(struct __sk_buff *skb)
{
	struct local_addr *local;
	struct ct_entry *e;
	struct glance g;
	__u64 at = epoch_now(), now;
	__u32 before, flags;
	bool reply;

	if (!glance(skb, &g))
		return SHORTCUT_NONE;
	e = bpf_map_lookup_elem(&ct, &g.key);
	if (!e)
		return SHORTCUT_NONE;
	now = expiry_clock();
	before = e->flags;
	reply = g.from_b != !!(before & CT_ORIG_B);
	if (!row_answers(e, before, at, now, skb->ifindex, reply))
		return SHORTCUT_NONE;
	flags = ct_flags_after(before, g.tcp_flags, reply);
	if (ct_closed(flags) && !ct_closed(before)) /* there is an end to report */
		return SHORTCUT_NONE;
	local = bpf_map_lookup_elem(&local_addrs, g.from_b ? &g.key.a : &g.key.b);
	if (!local || local->flags & LOCAL_HOST)
		return SHORTCUT_NONE;
	ct_account(e, reply, g.length);
	ct_refresh(e, before, flags, g.key.protocol, now);
	return into_pod(skb, local->macs, local->ifindex, g.length, true);
}
