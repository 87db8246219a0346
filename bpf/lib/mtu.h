/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The redirects skip the stack, so the datapath says "fragmentation needed" (RFC 1191) and "packet too big" (RFC 8201). */
#pragma once
#include "answer.h"

/* Octets of the largest packet on the wire: of one segment where the device will cut it (GSO). */
static __always_inline __u32 wire_length(const struct __sk_buff *skb, const struct pkt *p)
{
	if (!skb->gso_size)
		return p->length;
	return skb->gso_size + (p->l4 - p->l3) + p->l4_header;
}

/* Turns a pod's packet into the error it deserves and sends it back; the packet counts as dropped. */
static __noinline int too_big_answer(struct __sk_buff *skb, struct scratch *s, const struct endpoint *ep, __u32 mtu)
{
	union addr gateway;
	int error;

	if (!s || !ep)
		return TC_ACT_SHOT;
	if (!may_answer(&s->p))
		return drop(s, -DROP_TOO_BIG);
	gateway = gateway_of(s->p.family);
	error = icmp_error(skb, s, &gateway,
			   s->p.family == 4 ? ICMP_DEST_UNREACH << 8 | ICMP_FRAG_NEEDED : ICMPV6_PKT_TOOBIG << 8,
			   bpf_htonl(mtu));
	if (error)
		return drop(s, error);
	drop(s, -DROP_TOO_BIG);
	error = answer_pod(skb, ep);
	return error < 0 ? TC_ACT_SHOT : error;
}
