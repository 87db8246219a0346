/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Everything a pod sends. Attached to the ingress of its host-side interface. */
#pragma once
#include "../lib/deliver.h"
#include "../lib/neigh.h"

static __always_inline bool owns_source(const struct endpoint *ep, const struct pkt *p)
{
	return !addr_zero(&p->saddr) && addr_equal(&p->saddr, p->family == 4 ? &ep->v4 : &ep->v6);
}

/* A pod may not speak the overlay's protocol to any node, nor to the world with this node's address: behind an address
 * that the ipcache does not have there may be a node, and it would trust the sender.
 */
static __always_inline bool forges_tunnel(const struct scratch *s)
{
	return s->p.protocol == IPPROTO_UDP && s->p.dport == bpf_htons(config_tunnel_port) &&
	       (s->kind == DEST_HOST || s->dest_node == 1 ||
		(config_masquerade && s->kind == DEST_NATIVE && s->dest_node != 2));
}

static __always_inline __u32 path_mtu(const struct scratch *s, const struct endpoint *ep)
{
	if (s->kind == DEST_TUNNEL)
		return config_tunnel_mtu;
	return s->kind == DEST_NATIVE ? config_underlay_mtu : ep->mtu > 65000 ? ep->mtu : 65535;
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	struct scratch *s = start(skb, OBS_FROM_POD);
	__u32 ifindex = skb->ifindex, mtu;
	struct endpoint *ep;
	int result;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	s->kind = DEST_POD;
	s->dest_node = 0;
	ep = bpf_map_lookup_elem(&endpoints, &ifindex);
	if (!ep)
		return drop(s, -DROP_NO_ENDPOINT);
	end_of_endpoint(&s->ends[0], ep);
	skb->mark = 0;
	if (skb->vlan_present) /* the tag would leave the node with the packet */
		return drop(s, -DROP_UNSUPPORTED_L3);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return arp_answer(skb, s, ep);
	result = pkt_parse(skb, &s->p);
	if (result < 0)
		return drop(s, result);
	if (is_nd(&s->p) && s->p.frag == FRAG_NONE)
		return nd_answer(skb, s, ep);
	if (stays_on_link(&s->p.daddr))
		return drop_quietly(s, -DROP_UNSUPPORTED_DEST);
	if (!owns_source(ep, &s->p))
		return drop(s, -DROP_INVALID_SIP);
	if (s->p.frag != FRAG_NONE) {
		result = frag_ports(s);
		if (result < 0)
			return drop(s, result);
	}
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	if (forges_tunnel(s))
		return drop(s, -DROP_TUNNEL_PORT);
	result = track(s, TRACK_POLICY);
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD) {
		result = to_proxy(skb, s, result == TRACK_TO_LISTENER);
		return result < 0 ? drop(s, result) : TC_ACT_OK;
	}
	result = route_replies(s);
	if (result < 0)
		return drop(s, result);
	mtu = path_mtu(s, ep);
	if (wire_length(skb, &s->p) > mtu && (s->p.dont_fragment || s->kind == DEST_NATIVE))
		return too_big_answer(skb, s, ep, mtu);
	switch (s->kind) {
	case DEST_POD:
		return deliver_local(skb, s);
	case DEST_HOST:
		count(0, DIR_EGRESS, s->p.length);
		return TC_ACT_OK;
	case DEST_TUNNEL:
		return encapsulate(skb, s);
	default:
		return send_native(skb, s);
	}
}
