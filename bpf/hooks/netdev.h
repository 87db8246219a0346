/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What arrives at the node outside the overlay. Attached to the ingress of the underlay device.
 *
 * Packets for the node itself belong to its stack, unless they answer a masqueraded connection.
 */
#pragma once
#include "../lib/deliver.h"

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

/* The source as the ipcache knows it; an address of a pod or of this node does not come from outside. */
static __always_inline int source_outside(struct scratch *s)
{
	struct ipcache_entry *entry;

	if (bpf_map_lookup_elem(&local_addrs, &s->p.saddr))
		return -DROP_INVALID_SIP;
	entry = ipcache_find(&s->p.saddr);
	if (!entry) {
		end_remote(&s->ends[0], world_identity(&s->p), false);
		return 0;
	}
	if (config_tunnel && entry->flags & IPCACHE_POD)
		return -DROP_INVALID_SIP;
	end_remote(&s->ends[0], entry->identity, entry->flags & (IPCACHE_POD | IPCACHE_NODE));
	return 0;
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
	if (result < 0)
		return TC_ACT_UNSPEC; /* not for a pod as far as can be told: the stack's to judge */
	if (s->p.frag != FRAG_NONE && frag_ports(s) < 0)
		return bpf_map_lookup_elem(&local_addrs, &s->p.daddr) ? TC_ACT_UNSPEC : TC_ACT_UNSPEC;
	result = for_pod(skb, s);
	if (!result)
		return TC_ACT_UNSPEC;
	if (result < 0)
		return drop(s, result);
	result = source_outside(s);
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
