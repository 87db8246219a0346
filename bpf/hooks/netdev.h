/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What arrives at the node outside the overlay. Attached to the ingress of the underlay device.
 *
 * Packets for the node itself belong to its stack, unless they answer a masqueraded connection.
 */
#pragma once
#include "../lib/deliver.h"

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

/* What cannot be parsed or assigned to a datagram: dropped here if it is for a pod, else the stack's to judge. */
static __always_inline int refuse(struct scratch *s, int error)
{
	struct local_addr *local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);

	return local && !(local->flags & LOCAL_HOST) ? drop(s, error) : TC_ACT_UNSPEC;
}

/* The source as the ipcache knows it; an address of a pod or of this node does not come from outside. */
static __always_inline int source_outside(struct scratch *s)
{
	struct ipcache_entry *entry;

	if (stays_on_link(&s->p.saddr) || bpf_map_lookup_elem(&local_addrs, &s->p.saddr))
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
	int result, owner;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	if (skb->vlan_present)
		return TC_ACT_UNSPEC; /* another device's, on top of this one */
	result = pkt_parse(skb, &s->p);
	if (result < 0)
		return refuse(s, result);
	if (s->p.frag != FRAG_NONE) {
		result = frag_ports(s);
		if (result < 0)
			return refuse(s, result);
	}
	owner = for_pod(skb, s);
	if (owner == OWNER_STACK)
		return TC_ACT_UNSPEC;
	if (owner < 0)
		return drop(s, owner);
	result = source_outside(s);
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
