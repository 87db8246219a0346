/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What arrives at the node outside the overlay. Attached to the ingress of the underlay device.
 *
 * Packets for the node itself belong to its stack, unless they answer a masqueraded connection or a node policy refuses them.
 */
#pragma once
#include "../lib/node.h"

enum owner { OWNER_STACK = 0, OWNER_POD = 1, OWNER_MASQUERADED = 2 /* a pod, found by its mapping */ };

/* Whose the packet is: enum owner or a negated drop reason. */
static __always_inline int for_pod(struct __sk_buff *skb, struct scratch *s)
{
	struct local_addr *local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);
	int result;

	if (!local)
		return OWNER_STACK;
	if (!(local->flags & LOCAL_HOST))
		return OWNER_POD;
	if (!config_masquerade)
		return OWNER_STACK;
	result = nat_in(skb, s);
	return result > 0 ? OWNER_MASQUERADED : result;
}

/* The source as the ipcache knows it; an address of a pod or of this node does not come from outside. Only the node has
 * neighbours with link-local addresses; and without masquerading, pods of other nodes speak to it with their own.
 */
static __always_inline int source_outside(struct scratch *s, bool to_pod)
{
	struct ipcache_entry *entry;

	if ((to_pod && stays_on_link(&s->p.saddr)) || bpf_map_lookup_elem(&local_addrs, &s->p.saddr))
		return -DROP_INVALID_SIP;
	entry = end_outside(s, &s->ends[0], &s->p.saddr);
	if (entry && entry->flags & IPCACHE_POD && config_tunnel && (to_pod || config_masquerade))
		return -DROP_INVALID_SIP;
	return 0;
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
	error = source_outside(s, false);
	return error < 0 ? drop(s, error) : judge_node(skb, s, policy);
}

/* What cannot be parsed or assigned to a datagram: dropped here if it is for a pod. */
static __always_inline int refuse(struct __sk_buff *skb, struct scratch *s, int error)
{
	struct local_addr *local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);

	return local && !(local->flags & LOCAL_HOST) ? drop(s, error) : for_node(skb, s, error);
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	struct scratch *s = start(skb, OBS_FROM_NETDEV);
	int result, owner;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	if (is_of_vlan(skb))
		return TC_ACT_UNSPEC;
	result = pkt_parse(skb, &s->p);
	if (!result && s->p.frag != FRAG_NONE)
		result = frag_ports(s);
	if (result < 0)
		return refuse(skb, s, result);
	owner = for_pod(skb, s);
	if (owner == OWNER_STACK)
		return for_node(skb, s, 0);
	if (owner < 0)
		return drop(s, owner);
	result = source_outside(s, true);
	if (result < 0)
		return drop(s, result);
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	if (s->kind != DEST_POD)
		return drop(s, -DROP_NO_ENDPOINT);
	/* A mapping lets in answers only: a connection of the peer's own making has no policy that could allow it. */
	result = track(s, owner == OWNER_MASQUERADED ? TRACK_REPLY : TRACK_POLICY);
	if (owner == OWNER_MASQUERADED && result == -DROP_INVALID_SIP)
		result = -DROP_NAT_NO_MAPPING;
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD) {
		result = to_proxy(skb, s, result == TRACK_TO_LISTENER);
		return result < 0 ? drop(s, result) : TC_ACT_OK;
	}
	return deliver_local(skb, s);
}
