/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* TCP and UDP between two pods of this node, where the connection is known: two look-ups.
 *
 * The verdict is that of the conntrack row and may be used while the row's epoch is that of now, as on the long way. Where
 * the destination is, and whether the source is the pod's own, is looked up here; the latter once an epoch. Whatever is
 * not plain, and what begins or ends a connection, goes the long way; so does an error, which is reported there.
 */
#pragma once
#include "deliver.h"

#define SHORTCUT_NONE (-1)
/* No pod's path takes less (path_mtu()), so a packet or segment up to here cannot be too big. */
#define SHORTCUT_MAX 65000
#define HEADERS_MAX 128 /* more than the plain headers that a segment repeats */

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
		if ((g->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
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
	if (!plain || g->length > skb->len - ETH_HLEN_)
		return false;
	return g->length <= SHORTCUT_MAX || (skb->gso_size && skb->gso_size <= SHORTCUT_MAX - HEADERS_MAX);
}

/* Names the sender of a connection's direction at an epoch in one word, which can be read and written in one access. The
 * connection is mixed in: the row may have become another one's since it was found, as rows of an LRU map do.
 */
static __always_inline __u64 sender_word(const struct glance *g, __u64 at, __u32 ifindex)
{
	__u64 word = at << 33 | (__u64)g->from_b << 32 | ifindex;
	const struct ct_key *key = &g->key;

	word = word * 0x9e3779b97f4a7c15ULL ^ key->a.d[1] ^ key->b.d[0];
	word = word * 0xbf58476d1ce4e5b9ULL ^ key->b.d[1] ^ key->a.d[0];
	word = word * 0x94d049bb133111ebULL;
	return word ^ ((__u64)key->aport << 32 | (__u64)key->bport << 16 | key->protocol);
}

/* Whether the pod behind this interface owns the packet's source address. What was found once is noted in the row. */
static __always_inline bool sender_owns(struct ct_entry *e, const struct glance *g, bool reply, __u64 at, __u32 ifindex)
{
	const union addr *source = g->from_b ? &g->key.b : &g->key.a;
	__u64 word = sender_word(g, at, ifindex);
	struct endpoint *ep;

	if (e->sender[reply ? 1 : 0] == word)
		return true;
	ep = bpf_map_lookup_elem(&endpoints, &ifindex);
	if (!ep || !addr_equal(source, addr_is_v4(source) ? &ep->v4 : &ep->v6))
		return false;
	e->sender[reply ? 1 : 0] = word;
	return true;
}

/* From a pod: returns what the hook shall return, or SHORTCUT_NONE, and then nothing has been counted or changed. */
static __always_inline int shortcut(struct __sk_buff *skb)
{
	bool embryonic = false, reply;
	struct local_addr *local;
	struct ct_entry *e;
	struct glance g;
	__u64 at = epoch_now(), now;
	__u32 before, flags;

	if (!glance(skb, &g))
		return SHORTCUT_NONE;
	local = bpf_map_lookup_elem(&local_addrs, g.from_b ? &g.key.a : &g.key.b);
	if (!local || local->flags & LOCAL_HOST)
		return SHORTCUT_NONE;
	e = bpf_map_lookup_elem(&ct, &g.key);
	if (!e) {
		e = bpf_map_lookup_elem(&ct_new, &g.key);
		embryonic = true;
	}
	if (!e)
		return SHORTCUT_NONE;
	now = expiry_clock();
	before = e->flags;
	reply = g.from_b != !!(before & CT_ORIG_B);
	flags = ct_flags_after(before, g.tcp_flags, reply);
	if (e->epoch != at || e->expires <= now || before & (CT_DENIED | CT_PROXIED | CT_SERVICE))
		return SHORTCUT_NONE;
	if (ct_closed(flags) && !ct_closed(before)) /* there is an end to report */
		return SHORTCUT_NONE;
	if (!sender_owns(e, &g, reply, at, skb->ifindex))
		return SHORTCUT_NONE;
	ct_account(e, reply, g.length);
	ct_refresh(e, before, flags, g.key.protocol, now);
	if (embryonic && reply && !ct_closed(flags))
		ct_promote(&g.key, e);
	return into_pod(skb, local->macs, local->ifindex, g.length, true);
}
