/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ICMP errors of the datapath's own (RFC 792, RFC 4443): the refused packet becomes the error and goes back. */
#pragma once
#include "event.h"
#include "neigh.h"
#include "packet.h"

#define QUOTE 96 /* most octets of the refused packet; more than both RFCs' least, less than any MTU */
#define ICMP_PORT_UNREACH 3
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PORT_UNREACH 4

struct icmp_error {
	__u8 type, code;
	__sum16 check;
	__be32 rest;     /* of too big: the MTU; IPv4: the low half */
	__u8 quote[128]; /* room up to the bound that the verifier sees */
};

static __always_inline int icmp_error_v4(struct __sk_buff *skb, struct scratch *s, struct icmp_error *icmp,
					 const union addr *from, __u32 octets)
{
	struct iphdr ip = {
		.version = 4,
		.ihl = 5,
		.ttl = 64,
		.protocol = IPPROTO_ICMP,
		.tot_len = bpf_htons(sizeof(ip) + octets),
	};

	ip.saddr = from->w[3];
	ip.daddr = s->p.saddr.w[3];
	ip.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&ip, sizeof(ip), 0));
	icmp->check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, octets, 0));
	if (bpf_skb_change_tail(skb, ETH_HLEN_ + sizeof(ip) + octets, 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_ + sizeof(ip), icmp, octets, BPF_F_RECOMPUTE_CSUM))
		return -DROP_WRITE_ERROR;
	return 0;
}

static __always_inline int icmp_error_v6(struct __sk_buff *skb, struct scratch *s, struct icmp_error *icmp,
					 const union addr *from, __u32 octets)
{
	struct ipv6hdr ip = {
		.version = 6,
		.hop_limit = 64,
		.nexthdr = PROTO_ICMPV6,
		.payload_len = bpf_htons(octets),
	};
	__be32 pseudo[2] = { bpf_htonl(octets), bpf_htonl(PROTO_ICMPV6) };
	__s64 sum;

	__builtin_memcpy(&ip.saddr, from, 16);
	__builtin_memcpy(&ip.daddr, &s->p.saddr, 16);
	sum = bpf_csum_diff(NULL, 0, pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&ip.saddr, 32, sum);
	icmp->check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, octets, sum));
	if (bpf_skb_change_tail(skb, ETH_HLEN_ + sizeof(ip) + octets, 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_ + sizeof(ip), icmp, octets, BPF_F_RECOMPUTE_CSUM))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* Makes the packet an error about itself, from `from` to its sender. 0 or a negated drop reason; -DROP_NONE is not one. */
static __noinline int icmp_error(struct __sk_buff *skb, struct scratch *s, const union addr *from, __u16 type_code,
				 __be32 rest)
{
	struct icmp_error *icmp;
	union addr source;
	__u32 quote;

	if (!s || !from)
		return -DROP_INTERNAL;
	icmp = (struct icmp_error *)s->octets;
	source = *from;
	icmp->type = type_code >> 8;
	icmp->code = type_code;
	icmp->check = 0;
	icmp->rest = rest;
	/* Whole words for the sum: all headers end at one, and 8 octets behind them are there (pkt_parse()). */
	quote = (s->p.length < QUOTE ? s->p.length : QUOTE) & 0x7c;
	if (quote < 28 || bpf_skb_load_bytes(skb, s->p.l3, icmp->quote, quote))
		return -DROP_INVALID_PACKET;
	quote += offsetof(struct icmp_error, quote);
	return s->p.family == 4 ? icmp_error_v4(skb, s, icmp, &source, quote) :
				  icmp_error_v6(skb, s, icmp, &source, quote);
}

/* Never an error about an error or a later fragment (RFC 1122, 3.2.2). */
static __always_inline bool may_answer(const struct pkt *p)
{
	return !p->quoted && p->frag != FRAG_LATER;
}

/* Sends the error that the packet has become into the pod that sent it. Straight, not by way of the device's transmit: if
 * the refused packet's checksum was left to a device (CHECKSUM_PARTIAL, which cannot be taken back here), one that sums in
 * software would write into the quote.
 */
static __always_inline int answer_pod(struct __sk_buff *skb, const struct endpoint *ep)
{
	struct ethhdr eth;

	__builtin_memcpy(eth.h_dest, ep->mac, 6);
	__builtin_memcpy(eth.h_source, ep->gw_mac, 6);
	eth.h_proto = skb->protocol;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0))
		return -DROP_WRITE_ERROR;
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* Sends it out again by the device that it came by, to whom it came from. */
static __always_inline int answer_link(struct __sk_buff *skb)
{
	__u8 macs[12], swapped[12];

	if (bpf_skb_load_bytes(skb, 0, macs, sizeof(macs)))
		return -DROP_WRITE_ERROR;
	__builtin_memcpy(swapped, macs + 6, 6);
	__builtin_memcpy(swapped + 6, macs, 6);
	if (bpf_skb_store_bytes(skb, 0, swapped, sizeof(swapped), 0))
		return -DROP_WRITE_ERROR;
	skb->mark = MARK_JUDGED;
	return bpf_redirect(skb->ifindex, 0);
}

/* Tells the sender that nobody serves what it asked: "port unreachable" from the address it asked. `ep`: the pod that sent
 * it; NULL: it came by the device and goes out there. Counts as dropped; returns what the hook shall return.
 */
static __noinline int reject_answer(struct __sk_buff *skb, struct scratch *s, const struct endpoint *ep)
{
	int result;

	if (!s)
		return TC_ACT_SHOT;
	drop(s, -DROP_NO_SERVICE);
	if (!may_answer(&s->p))
		return TC_ACT_SHOT;
	result = icmp_error(skb, s, &s->p.daddr,
			    s->p.family == 4 ? ICMP_DEST_UNREACH << 8 | ICMP_PORT_UNREACH :
					       ICMPV6_DEST_UNREACH << 8 | ICMPV6_PORT_UNREACH,
			    0);
	if (!result)
		result = ep ? answer_pod(skb, ep) : answer_link(skb);
	return result < 0 ? TC_ACT_SHOT : result;
}
