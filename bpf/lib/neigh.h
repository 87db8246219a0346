/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ARP (RFC 826) and neighbour discovery (RFC 4861) for the pods' gateway, answered without the stack. */
#pragma once
#include "event.h"
#include "packet.h"

#define ND_ROUTER_SOLICITATION 133
#define ND_NEIGHBOUR_SOLICITATION 135
#define ND_NEIGHBOUR_ADVERTISEMENT 136
#define ND_REDIRECT 137
#define ND_FLAGS bpf_htonl(0xe0000000) /* router, solicited, override */

struct arp_eth {
	__be16 htype, ptype;
	__u8 hlen, plen;
	__be16 op;
	__u8 sha[6];
	__be32 spa;
	__u8 tha[6];
	__be32 tpa;
} __attribute__((packed));

struct nd_advert {
	struct ethhdr eth;
	struct ipv6hdr ip;
	__u8 type, code;
	__sum16 check;
	__be32 flags;
	union addr target;
	__u8 option, option_len;
	__u8 mac[6];
} __attribute__((packed));
_Static_assert(sizeof(struct nd_advert) == 86, "an advertisement is 86 octets on Ethernet");

static __always_inline bool is_nd(const struct pkt *p)
{
	return p->family == 6 && p->protocol == PROTO_ICMPV6 && p->icmp_type >= ND_ROUTER_SOLICITATION &&
	       p->icmp_type <= ND_REDIRECT;
}

static __always_inline __u16 csum_fold(__s64 sum)
{
	__u32 folded = (__u32)sum;

	folded = (folded & 0xffff) + (folded >> 16);
	folded = (folded & 0xffff) + (folded >> 16);
	return ~folded;
}

/* Answers a request for the gateway; anything else is dropped quietly. */
static __noinline int arp_answer(struct __sk_buff *skb, struct scratch *s, const struct endpoint *ep)
{
	struct ethhdr eth;
	struct arp_eth arp;

	if (!s || !ep)
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) || bpf_skb_load_bytes(skb, ETH_HLEN_, &arp, sizeof(arp)))
		return drop_quietly(s, -DROP_INVALID_PACKET);
	if (arp.op != bpf_htons(1) || arp.tpa != config_gateway_v4.w[3] || !arp.tpa)
		return drop_quietly(s, -DROP_UNSUPPORTED_DEST);
	__builtin_memcpy(eth.h_dest, ep->mac, 6);
	__builtin_memcpy(eth.h_source, ep->gw_mac, 6);
	arp.op = bpf_htons(2);
	__builtin_memcpy(arp.tha, arp.sha, 6);
	__builtin_memcpy(arp.sha, ep->gw_mac, 6);
	arp.tpa = arp.spa;
	arp.spa = config_gateway_v4.w[3];
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN_, &arp, sizeof(arp), 0))
		return drop_quietly(s, -DROP_WRITE_ERROR);
	return bpf_redirect(skb->ifindex, 0);
}

/* Answers a solicitation for the gateway, never a duplicate-address probe (source ::); the rest is dropped quietly. */
static __noinline int nd_answer(struct __sk_buff *skb, struct scratch *s, const struct endpoint *ep)
{
	struct nd_advert *na;
	union addr target, gateway;
	__be32 pseudo[2];
	__s64 sum;

	if (!s || !ep)
		return TC_ACT_SHOT;
	if (s->p.icmp_type != ND_NEIGHBOUR_SOLICITATION || addr_zero(&s->p.saddr))
		return drop_quietly(s, -DROP_UNSUPPORTED_DEST);
	if (bpf_skb_load_bytes(skb, s->p.l4 + 8, &target, sizeof(target)))
		return drop_quietly(s, -DROP_INVALID_PACKET);
	gateway = config_addr(&config_gateway_v6);
	if (!addr_equal(&target, &gateway))
		return drop_quietly(s, -DROP_UNSUPPORTED_DEST);
	na = (struct nd_advert *)s->octets;
	__builtin_memset(na, 0, sizeof(*na));
	__builtin_memcpy(na->eth.h_dest, ep->mac, 6);
	__builtin_memcpy(na->eth.h_source, ep->gw_mac, 6);
	na->eth.h_proto = bpf_htons(ETH_P_IPV6);
	na->ip.version = 6;
	na->ip.payload_len = bpf_htons(32);
	na->ip.nexthdr = PROTO_ICMPV6;
	na->ip.hop_limit = 255;
	__builtin_memcpy(&na->ip.saddr, &target, 16);
	__builtin_memcpy(&na->ip.daddr, &s->p.saddr, 16);
	na->type = ND_NEIGHBOUR_ADVERTISEMENT;
	na->flags = ND_FLAGS;
	na->target = target;
	na->option = 2; /* target link-layer address */
	na->option_len = 1;
	__builtin_memcpy(na->mac, ep->gw_mac, 6);
	pseudo[0] = bpf_htonl(32);
	pseudo[1] = bpf_htonl(PROTO_ICMPV6);
	sum = bpf_csum_diff(NULL, 0, pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)(s->octets + offsetof(struct nd_advert, ip.saddr)), 32, sum);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)(s->octets + offsetof(struct nd_advert, type)), 32, sum);
	na->check = csum_fold(sum);
	if (bpf_skb_change_tail(skb, sizeof(*na), 0) || bpf_skb_store_bytes(skb, 0, na, sizeof(*na), 0))
		return drop_quietly(s, -DROP_WRITE_ERROR);
	return bpf_redirect(skb->ifindex, 0);
}
