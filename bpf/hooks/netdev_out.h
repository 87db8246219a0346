/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What leaves the node by the underlay device. Attached to its egress; judges only what the node itself made. */
#pragma once
#include "../lib/outside.h"

/* Whether somebody else made the packet, another hook has judged it, or it is another device's. Forwarded packets remember where they came in. */
static __always_inline bool is_judged(const struct __sk_buff *skb)
{
	__u32 mark = skb->mark & MARK_MASK;

	return skb->ingress_ifindex || mark == MARK_JUDGED || mark == MARK_FROM_PROXY || is_of_vlan(skb);
}

/* What may be the answer to a client outside that asked a service gets the frontend's address. */
static __noinline int from_frontend(struct __sk_buff *skb, struct scratch *s)
{
	int result;

	if (!s)
		return TC_ACT_SHOT;
	result = service_back(skb, s);
	return result < 0 ? drop(s, result) : TC_ACT_UNSPEC;
}

SEC("tc")
int to_netdev(struct __sk_buff *skb)
{
	struct local_addr *local;
	struct endpoint *node;
	struct scratch *s;
	__u32 policy;
	bool serves;
	int result;

	if (is_judged(skb))
		return TC_ACT_UNSPEC;
	node = policed_node();
	serves = does_stack_serve();
	if (!node && !serves)
		return TC_ACT_UNSPEC;
	s = start(skb, OBS_TO_NETDEV);
	if (!s)
		return TC_ACT_SHOT;
	if (node)
		end_of_endpoint(&s->ends[0], node);
	else
		end_remote(&s->ends[0], IDENTITY_HOST, true);
	end_remote(&s->ends[1], 0, false);
	policy = node ? s->ends[0].policy[DIR_EGRESS] : 0;
	result = pkt_parse(skb, &s->p);
	if (result == -DROP_UNSUPPORTED_L3 || (!result && is_link_control(&s->p)))
		return TC_ACT_UNSPEC; /* ARP and other things that are not IP; discovery */
	if (!result && s->p.frag != FRAG_NONE)
		result = frag_ports(s);
	if (result < 0)
		return policy ? drop(s, result) : TC_ACT_UNSPEC;
	local = bpf_map_lookup_elem(&local_addrs, &s->p.saddr);
	if (local && !(local->flags & LOCAL_HOST)) /* a pod's, by way of a proxy */
		return serves ? from_frontend(skb, s) : TC_ACT_UNSPEC;
	if (is_overlay(&s->p, &s->p.daddr))
		return TC_ACT_UNSPEC;
	end_outside(s, &s->ends[1], &s->p.daddr);
	result = node ? judge_node(skb, s, policy) : TC_ACT_UNSPEC;
	return result == TC_ACT_UNSPEC && serves ? from_frontend(skb, s) : result;
}
