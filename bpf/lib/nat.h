/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Masquerade: pods leave the cluster with the node's address and a port that nobody else has towards that peer.
 *
 * Two rows a mapping. NAT_IN is the claim (made with BPF_NOEXIST, so two CPUs cannot take one port); NAT_OUT finds it
 * again. Either may be evicted; the other makes it anew.
 */
#pragma once
#include "conntrack.h"
#include "packet.h"

#define NAT_TRIES 24

static __always_inline bool nat_has_ports(const struct pkt *p)
{
	return p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP ||
	       (is_icmp(p) && icmp_is_echo(p->family, p->icmp_type));
}

/* Offset of the checksum that covers addresses or ports, 0: none. */
static __always_inline __u16 l4_check_offset(const struct pkt *p)
{
	if (p->protocol == IPPROTO_TCP)
		return p->l4 + offsetof(struct tcphdr, check);
	if (p->protocol == IPPROTO_UDP)
		return p->l4 + offsetof(struct udphdr, check);
	return is_icmp(p) ? p->l4 + offsetof(struct icmp_head, check) : 0;
}

/* Changes an address of the IP header and what the checksums say of it. */
static __always_inline int rewrite_addr(struct __sk_buff *skb, struct pkt *p, bool source, const union addr *to)
{
	union addr from = source ? p->saddr : p->daddr;
	__u64 flags = BPF_F_PSEUDO_HDR;
	__u16 check = p->frag == FRAG_LATER ? 0 : l4_check_offset(p);
	__s64 diff;

	if (p->protocol == IPPROTO_UDP)
		flags |= BPF_F_MARK_MANGLED_0;
	if (p->family == 4) {
		__u16 at = p->l3 + (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
		__be32 old = from.w[3], new = to->w[3];

		if (check && !is_icmp(p) && bpf_l4_csum_replace(skb, check, old, new, flags | 4))
			return -DROP_WRITE_ERROR;
		if (bpf_l3_csum_replace(skb, p->l3 + offsetof(struct iphdr, check), old, new, 4) ||
		    bpf_skb_store_bytes(skb, at, &new, 4, 0))
			return -DROP_WRITE_ERROR;
	} else {
		__u16 at = p->l3 + (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
		union addr new = *to;

		diff = bpf_csum_diff(from.w, 16, new.w, 16, 0);
		if (check && bpf_l4_csum_replace(skb, check, 0, diff, flags))
			return -DROP_WRITE_ERROR;
		/* No header checksum makes up for the address, so a device's sum over the packet must be told. */
		if (bpf_skb_store_bytes(skb, at, &new, 16, BPF_F_RECOMPUTE_CSUM))
			return -DROP_WRITE_ERROR;
	}
	if (source)
		p->saddr = *to;
	else
		p->daddr = *to;
	return 0;
}

/* Changes a port, or an echo's identifier. */
static __always_inline int rewrite_port(struct __sk_buff *skb, struct pkt *p, bool source, __be16 port)
{
	__be16 old = source ? p->sport : p->dport;
	__u16 at = p->l4 + (source ? 0 : 2);
	__u64 flags = p->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

	if (old != port && p->frag != FRAG_LATER) {
		if (is_icmp(p))
			at = p->l4 + offsetof(struct icmp_head, id);
		if (bpf_l4_csum_replace(skb, l4_check_offset(p), old, port, flags | 2) ||
		    bpf_skb_store_bytes(skb, at, &port, 2, 0))
			return -DROP_WRITE_ERROR;
	}
	if (source || is_icmp(p))
		p->sport = port;
	if (!source || is_icmp(p))
		p->dport = port;
	return 0;
}

/* Whether a socket of the node itself holds the port towards the peer. */
static __always_inline bool port_held(struct __sk_buff *skb, const struct nat_key *in, __u8 family)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;

	if (in->protocol != IPPROTO_TCP && in->protocol != IPPROTO_UDP)
		return false;
	if (family == 4) {
		tuple.ipv4.saddr = in->peer.w[3];
		tuple.ipv4.daddr = in->inner.w[3];
		tuple.ipv4.sport = in->peer_port;
		tuple.ipv4.dport = in->inner_port;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &in->peer, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &in->inner, 16);
		tuple.ipv6.sport = in->peer_port;
		tuple.ipv6.dport = in->inner_port;
		size = sizeof(tuple.ipv6);
	}
	if (in->protocol == IPPROTO_TCP)
		sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* Claims `in` for `owner`; a claim that has run out is taken over. */
static __always_inline bool nat_claim(struct scratch *s, const struct nat_key *in, const struct nat_entry *owner)
{
	struct nat_entry *held = bpf_map_lookup_elem(&nat, in);

	if (held) {
		if (held->expires >= s->now)
			return addr_equal(&held->addr, &owner->addr) && held->port == owner->port;
		bpf_map_delete_elem(&nat, in);
	}
	return !bpf_map_update_elem(&nat, in, owner, BPF_NOEXIST);
}

/* Where the search for a port begins: the same for each packet of a connection, so that it finds its claim again after
 * the NAT_OUT row was evicted.
 */
static __always_inline __u32 nat_hash(const struct pkt *p)
{
	__u64 x = p->saddr.d[0] ^ p->saddr.d[1] ^ ((__u64)p->sport << 48 | (__u64)p->dport << 32 | p->protocol);

	x = (x ^ x >> 32) * 0x9e3779b97f4a7c15ULL;
	x ^= p->daddr.d[0] ^ p->daddr.d[1];
	x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9ULL;
	return x >> 32;
}

/* A free port of the node towards the packet's peer, in `in->inner_port`; the claim is made. */
static __always_inline int nat_choose(struct __sk_buff *skb, struct scratch *s, struct nat_key *in,
				      const struct nat_entry *owner)
{
	__u32 low = config_nat_port_min, range = config_nat_port_max - low + 1, start, own;

	if (!range)
		return -DROP_NAT_NO_MAPPING;
	own = bpf_ntohs(s->p.sport);
	start = own - low < range ? own - low : nat_hash(&s->p) % range;
	for (__u32 i = 0; i < NAT_TRIES; i++) {
		in->inner_port = bpf_htons(low + (start + (range > NAT_TRIES ? i * i : i)) % range);
		if (!port_held(skb, in, s->p.family) && nat_claim(s, in, owner))
			return 0;
	}
	return -DROP_NAT_NO_MAPPING;
}

/* Gives a pod's packet to the world the node's address. Returns 0 or a negated drop reason. */
static __noinline int nat_out(struct __sk_buff *skb, struct scratch *s)
{
	struct nat_key out = {}, in = {};
	struct nat_entry owner = {}, mapped = {}, *known;
	struct pkt *p;
	int error;

	if (!s)
		return -DROP_INTERNAL;
	p = &s->p;
	mapped.addr = p->family == 4 ? config_addr(&config_node_v4) : config_addr(&config_node_v6);
	if (addr_zero(&mapped.addr))
		return -DROP_NO_ROUTE;
	if (p->quoted || !nat_has_ports(p))
		return -DROP_UNKNOWN_L4;
	out.inner = p->saddr;
	out.inner_port = p->sport;
	in.peer = out.peer = p->daddr;
	in.peer_port = out.peer_port = is_icmp(p) ? 0 : p->dport;
	in.protocol = out.protocol = p->protocol;
	out.dir = NAT_OUT;
	in.dir = NAT_IN;
	in.inner = mapped.addr;
	owner.addr = p->saddr;
	owner.port = p->sport;
	owner.expires = mapped.expires = s->now + ct_life(p->protocol, s->flags);
	known = bpf_map_lookup_elem(&nat, &out);
	if (known && known->expires >= s->now) {
		struct nat_entry *half;

		in.inner_port = known->port;
		half = bpf_map_lookup_elem(&nat, &in);
		if (half && half->expires >= s->now && half->port == owner.port &&
		    addr_equal(&half->addr, &owner.addr)) {
			known->expires = half->expires = owner.expires;
			goto rewrite;
		}
		if (nat_claim(s, &in, &owner)) { /* made anew */
			known->expires = owner.expires;
			goto rewrite;
		}
	}
	error = nat_choose(skb, s, &in, &owner);
	if (error)
		return error;
	mapped.port = in.inner_port;
	if (bpf_map_update_elem(&nat, &out, &mapped, BPF_ANY))
		return -DROP_NAT_NO_MAPPING;
rewrite:
	error = rewrite_addr(skb, p, true, &mapped.addr);
	return error ?: rewrite_port(skb, p, true, in.inner_port);
}

/* Changes an address and port of the packet that an ICMP error quotes, and the error's checksum. */
static __always_inline int quoted_end(struct __sk_buff *skb, struct pkt *p, bool source, const union addr *to,
				      __be16 port)
{
	bool icmp = p->q_protocol == (p->family == 4 ? IPPROTO_ICMP : PROTO_ICMPV6);
	__u16 check = p->l4 + offsetof(struct icmp_head, check), port_at = p->q_l4 + (icmp ? 4 : source ? 0 : 2);
	union addr old = source ? p->q_saddr : p->q_daddr, new = *to;
	__be16 old_port = source ? p->q_sport : p->q_dport;

	if (p->family == 4) {
		__u16 at = p->q_l3 + (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));

		/* The quoted header's own checksum moves by what its address moves, so the outer sum stays. */
		if (bpf_l3_csum_replace(skb, p->q_l3 + offsetof(struct iphdr, check), old.w[3], new.w[3], 4) ||
		    bpf_skb_store_bytes(skb, at, &new.w[3], 4, 0))
			return -DROP_WRITE_ERROR;
	} else {
		__u16 at = p->q_l3 + (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
		__s64 diff = bpf_csum_diff(old.w, 16, new.w, 16, 0);

		if (bpf_l4_csum_replace(skb, check, 0, diff, 0) || bpf_skb_store_bytes(skb, at, &new, 16, 0))
			return -DROP_WRITE_ERROR;
	}
	if (port != old_port &&
	    (bpf_l4_csum_replace(skb, check, old_port, port, 2) || bpf_skb_store_bytes(skb, port_at, &port, 2, 0)))
		return -DROP_WRITE_ERROR;
	if (source) {
		p->q_saddr = new;
		p->q_sport = port;
	} else {
		p->q_daddr = new;
		p->q_dport = port;
	}
	if (icmp)
		p->q_sport = p->q_dport = port;
	return 0;
}

/* An ICMP error about a masqueraded packet: the quoted source goes back to the pod's, then the outer destination. */
static __always_inline int nat_in_quoted(struct __sk_buff *skb, struct pkt *p, const struct nat_entry *to)
{
	int error = quoted_end(skb, p, true, &to->addr, to->port);

	return error ?: rewrite_addr(skb, p, false, &to->addr);
}

/* Undoes the masquerade of a packet to the node's address. 1: done; 0: not one of ours; else a negated drop reason. */
static __noinline int nat_in(struct __sk_buff *skb, struct scratch *s)
{
	struct nat_key in = {};
	struct nat_entry *found, to;
	struct pkt *p;
	int error;

	if (!s)
		return -DROP_INTERNAL;
	p = &s->p;
	in.dir = NAT_IN;
	if (p->quoted) {
		bool icmp = p->q_protocol == (p->family == 4 ? IPPROTO_ICMP : PROTO_ICMPV6);

		if (!addr_equal(&p->q_saddr, &p->daddr))
			return 0;
		in.inner = p->q_saddr;
		in.peer = p->q_daddr;
		in.inner_port = p->q_sport;
		in.peer_port = icmp ? 0 : p->q_dport;
		in.protocol = p->q_protocol;
	} else {
		if (!nat_has_ports(p) || is_echo_request(p)) /* a request answers nobody */
			return 0;
		in.inner = p->daddr;
		in.peer = p->saddr;
		in.inner_port = p->dport;
		in.peer_port = is_icmp(p) ? 0 : p->sport;
		in.protocol = p->protocol;
	}
	found = bpf_map_lookup_elem(&nat, &in);
	if (!found || found->expires < s->now)
		return 0;
	to = *found;
	if (p->quoted) {
		error = nat_in_quoted(skb, p, &to);
		return error ?: 1;
	}
	/* A TCP mapping lives by what the pod sends, which conntrack has judged; what comes in may only end it. */
	if (p->protocol != IPPROTO_TCP)
		found->expires = s->now + ct_life(p->protocol, CT_SEEN_REPLY);
	else if (p->tcp_flags & TCP_RST && found->expires > s->now + CT_LIFE_CLOSING)
		found->expires = s->now + CT_LIFE_CLOSING;
	error = rewrite_addr(skb, p, false, &to.addr);
	if (!error)
		error = rewrite_port(skb, p, false, to.port);
	return error ?: 1;
}
