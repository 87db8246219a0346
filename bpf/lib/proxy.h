/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Hands packets to the proxy's sockets on this node; the packet keeps its addresses. Ingress hooks only. */
#pragma once
#include "event.h"
#include "packet.h"

#define TCP_STATE_TIME_WAIT 6
#define TCP_STATE_LISTEN 10

static __always_inline int assign(struct __sk_buff *skb, struct bpf_sock *sk)
{
	long error = bpf_sk_assign(skb, sk, 0);

	bpf_sk_release(sk);
	return error ? -DROP_PROXY_NOT_FOUND : 0;
}

/* To the socket that already has this connection; 1: there is none. */
static __always_inline int assign_connected(struct __sk_buff *skb, const struct pkt *p)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;

	if (p->family == 4) {
		tuple.ipv4.saddr = p->saddr.w[3];
		tuple.ipv4.daddr = p->daddr.w[3];
		tuple.ipv4.sport = p->sport;
		tuple.ipv4.dport = p->dport;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &p->saddr, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &p->daddr, 16);
		tuple.ipv6.sport = p->sport;
		tuple.ipv6.dport = p->dport;
		size = sizeof(tuple.ipv6);
	}
	sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return 1;
	if (sk->state == TCP_STATE_LISTEN || sk->state == TCP_STATE_TIME_WAIT) {
		bpf_sk_release(sk);
		return 1;
	}
	return assign(skb, sk);
}

/* To the listener of the rule set, which is transparent and bound to the loopback address. */
static __always_inline int assign_listener(struct __sk_buff *skb, const struct pkt *p, __u32 l7)
{
	struct listener *listener = bpf_map_lookup_elem(&listeners, &l7);
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	__u32 size;

	if (!listener)
		return -DROP_PROXY_NOT_FOUND;
	if (p->family == 4) {
		tuple.ipv4.daddr = bpf_htonl(0x7f000001);
		tuple.ipv4.dport = listener->port;
		size = sizeof(tuple.ipv4);
	} else {
		tuple.ipv6.daddr[3] = bpf_htonl(1);
		tuple.ipv6.dport = listener->port;
		size = sizeof(tuple.ipv6);
	}
	sk = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return -DROP_PROXY_NOT_FOUND;
	return assign(skb, sk);
}

/* `listen`: a new connection may go to the rule set's listener. The packet then goes up the stack. */
static __noinline int to_proxy(struct __sk_buff *skb, struct scratch *s, int listen)
{
	int result;

	if (!s)
		return -DROP_INTERNAL;
	if (!s->p.quoted) { /* an ICMP error finds its socket by itself */
		result = assign_connected(skb, &s->p);
		if (result > 0)
			result = listen ? assign_listener(skb, &s->p, s->l7) : -DROP_PROXY_NOT_FOUND;
		if (result < 0)
			return result;
	}
	count(0, s->observation == OBS_FROM_POD ? DIR_EGRESS : DIR_INGRESS, s->p.length);
	skb->mark = MARK_TO_PROXY;
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return 0;
}
