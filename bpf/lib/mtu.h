/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The redirects skip the stack, so the datapath says "fragmentation needed" (RFC 1191) and "packet too big" (RFC 8201). */
#pragma once
#include "event.h"
#include "neigh.h"
#include "packet.h"

#define QUOTE 96 /* octets of the refused packet; more than both RFCs' least, less than any MTU */

struct icmp_too_big {
	__u8 type, code;
	__sum16 check;
	__be32 mtu; /* IPv4: the low half */
	__u8 quote[QUOTE];
};

/* Octets of the largest packet on the wire: of one segment where the device will cut it (GSO). */
static __always_inline __u32 wire_length(const struct __sk_buff *skb, const struct pkt *p)
{
	if (!skb->gso_size)
		return p->length;
	return skb->gso_size + (p->l4 - p->l3) + p->l4_header;
}

static __always_inline int too_big_v4(struct __sk_buff *skb, struct scratch *s, struct icmp_too_big *icmp)
{
	struct iphdr ip = {
		.version = 4,
		.ihl = 5,
		.ttl = 64,
		.protocol = IPPROTO_ICMP,
		.tot_len = bpf_htons(sizeof(ip) + sizeof(*icmp)),
	};

	icmp->type = ICMP_DEST_UNREACH;
	icmp->code = ICMP_FRAG_NEEDED;
	ip.saddr = config_gateway_v4.w[3];
	ip.daddr = s->p.saddr.w[3];
	ip.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&ip, sizeof(ip), 0));
	icmp->check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp), 0));
	if (bpf_skb_change_tail(skb, ETH_HLEN_ + sizeof(ip) + sizeof(*icmp), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_, &ip, sizeof(ip), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_ + sizeof(ip), icmp, sizeof(*icmp), 0))
		return -DROP_WRITE_ERROR;
	return 0;
}

static __always_inline int too_big_v6(struct __sk_buff *skb, struct scratch *s, struct icmp_too_big *icmp)
{
	struct ipv6hdr ip = {
		.version = 6,
		.hop_limit = 64,
		.nexthdr = PROTO_ICMPV6,
		.payload_len = bpf_htons(sizeof(*icmp)),
	};
	__be32 pseudo[2] = { bpf_htonl(sizeof(*icmp)), bpf_htonl(PROTO_ICMPV6) };
	union addr gateway;
	__s64 sum;

	icmp->type = ICMPV6_PKT_TOOBIG;
	icmp->code = 0;
	gateway = config_addr(&config_gateway_v6);
	__builtin_memcpy(&ip.saddr, &gateway, 16);
	__builtin_memcpy(&ip.daddr, &s->p.saddr, 16);
	sum = bpf_csum_diff(NULL, 0, pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&ip.saddr, 32, sum);
	icmp->check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp), sum));
	if (bpf_skb_change_tail(skb, ETH_HLEN_ + sizeof(ip) + sizeof(*icmp), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_, &ip, sizeof(ip), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_ + sizeof(ip), icmp, sizeof(*icmp), 0))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* Turns a pod's packet into the error it deserves and sends it back; the packet counts as dropped. */
static __noinline int too_big_answer(struct __sk_buff *skb, struct scratch *s, const struct endpoint *ep, __u32 mtu)
{
	struct icmp_too_big *icmp;
	struct ethhdr eth;
	int error;

	if (!s || !ep)
		return TC_ACT_SHOT;
	icmp = (struct icmp_too_big *)s->octets;
	if (s->p.quoted || s->p.frag == FRAG_LATER) /* never an error about an error or a later fragment (RFC 1122) */
		return drop(s, -DROP_TOO_BIG);
	icmp->check = 0;
	icmp->mtu = bpf_htonl(mtu);
	if (bpf_skb_load_bytes(skb, s->p.l3, icmp->quote, QUOTE))
		return drop(s, -DROP_INVALID_PACKET);
	__builtin_memcpy(eth.h_dest, ep->mac, 6);
	__builtin_memcpy(eth.h_source, ep->gw_mac, 6);
	eth.h_proto = skb->protocol;
	error = s->p.family == 4 ? too_big_v4(skb, s, icmp) : too_big_v6(skb, s, icmp);
	if (error || bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0))
		return drop(s, -DROP_WRITE_ERROR);
	drop(s, -DROP_TOO_BIG);
	/* Straight into the pod, not by way of the device's transmit: if the refused packet's checksum was left to a
	 * device (CHECKSUM_PARTIAL, which cannot be taken back here), one that sums in software would write into the quote.
	 */
	return bpf_redirect_peer(skb->ifindex, 0);
}
