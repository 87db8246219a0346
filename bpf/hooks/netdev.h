/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What arrives at the node outside the overlay. Attached to the ingress of the underlay device.
 *
 * Packets for the node itself belong to its stack, unless they answer a masqueraded connection or a node policy refuses them.
 */
#pragma once
#include "../lib/node.h"

/* Whose the packet is: 1 for a pod of this node, 0 for the stack, else a negated drop reason. */
static __always_inline int for_pod(struct __sk_buff *skb, struct scratch *s)
{
	struct local_addr *local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);
	int result;

	if (!local)
		return 0;
	if (!(local->flags & LOCAL_HOST))
		return 1;
	if (!config_masquerade)
		return 0;
	result = nat_in(skb, s);
	if (result > 0 && s->p.frag == FRAG_FIRST)
		s->flags = 0;
	return result;
}

/* The source as the ipcache knows it; an address of this node, or of a pod if `no_pods`, does not come from outside. */
static __always_inline int source_outside(struct scratch *s, bool no_pods)
{
	struct ipcache_entry *entry;

	if (bpf_map_lookup_elem(&local_addrs, &s->p.saddr))
		return -DROP_INVALID_SIP;
	entry = end_outside(s, &s->ends[0], &s->p.saddr);
	return entry && no_pods && entry->flags & IPCACHE_POD ? -DROP_INVALID_SIP : 0;
}

/* The stack's, unless a node policy is in force and refuses it. `error`: why the packet could not be understood, or 0. */
static __noinline int for_node(struct __sk_buff *skb, struct scratch *s, int error)
{
	struct endpoint *node = policed_node();
	__u32 policy;

	if (!s)
		return TC_ACT_SHOT;
	if (!node || error == -DROP_UNSUPPORTED_L3)
		return TC_ACT_UNSPEC;
	end_of_endpoint(&s->ends[1], node);
	policy = s->ends[1].policy[DIR_INGRESS];
	if (error != -DROP_INVALID_PACKET && !is_for_node(skb, s))
		return TC_ACT_UNSPEC; /* forwarded */
	if (error)
		return policy ? drop(s, error) : TC_ACT_UNSPEC;
	if (is_link_control(&s->p) || is_overlay(&s->p, &s->p.saddr))
		return TC_ACT_UNSPEC;
	/* With the overlay and the masquerade, pods of other nodes come with their node's address. */
	error = source_outside(s, config_tunnel && config_masquerade);
	return error < 0 ? drop(s, error) : judge_node(skb, s, policy);
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	struct scratch *s = start(skb, OBS_FROM_NETDEV);
	int result;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	result = pkt_parse(skb, &s->p);
	if (!result && s->p.frag != FRAG_NONE)
		result = frag_ports(s);
	if (result < 0)
		return for_node(skb, s, result); /* not for a pod as far as can be told */
	result = for_pod(skb, s);
	if (!result)
		return for_node(skb, s, 0);
	if (result < 0)
		return drop(s, result);
	result = source_outside(s, config_tunnel);
	if (result < 0)
		return drop(s, result);
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	if (s->kind != DEST_POD)
		return drop(s, -DROP_NO_ENDPOINT);
	result = track(s, TRACK_POLICY);
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD) {
		result = to_proxy(skb, s, result == TRACK_TO_LISTENER);
		return result < 0 ? drop(s, result) : TC_ACT_OK;
	}
	return deliver_local(skb, s);
}
